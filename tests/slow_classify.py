"""classify.py with the tiny network, which takes its time here: a process that tests stop before it has finished."""

import dataclasses
import sys
import time
from unittest.mock import patch

import torch
from tiny import build_tiny_classifier, build_tiny_network
from torch import Tensor, nn

import classify

SECONDS_PER_BATCH = 0.5


class SlowNetwork(nn.Module):
    """Any network, as slow as a large one on a busy machine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, S, S) -> the network's output."""
        time.sleep(SECONDS_PER_BATCH)
        outputs: Tensor = self.network(inputs)
        return outputs


if __name__ == "__main__":
    torch.set_num_threads(1)
    classifier = build_tiny_classifier(build_tiny_network())
    slow = dataclasses.replace(classifier, network=SlowNetwork(classifier.network))
    with patch("classify.load_fastest", return_value=slow):
        sys.exit(classify.main())

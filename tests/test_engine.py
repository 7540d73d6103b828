from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pictures import ROOT
from torch import nn

import engine
from images import find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, Classifier


@pytest.fixture(scope="module")
def fast() -> Classifier:
    return engine.load_fastest(DEFAULT_CHECKPOINT)


def test_openvino_gives_the_answers_of_pytorch(fast: Classifier, classifier: Classifier) -> None:
    assert isinstance(fast.network, engine.OpenVINONetwork)
    pictures = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    for ours, theirs in zip(fast.predict(pictures), classifier.predict(pictures), strict=True):
        assert ours.verdict == theirs.verdict
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=0.02)
    assert fast.sha256 == classifier.sha256


def test_an_answer_stays_when_the_next_one_comes(fast: Classifier) -> None:
    """OpenVINO writes every answer to the same memory."""
    size = fast.preprocessing.input_size
    first = fast.network(torch.zeros(1, 3, size, size))
    before = first.clone()
    fast.network(torch.ones(1, 3, size, size))
    assert torch.equal(first, before)


def test_threads_at_once_get_their_own_answers(tiny_network: nn.Module) -> None:
    compiled = engine.compile_network(tiny_network, 64, at_once=2)
    inputs = torch.randn(200, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        answers = torch.cat(list(pool.map(compiled, inputs)))
    torch.testing.assert_close(answers, tiny_network(inputs[:, 0]), rtol=0.02, atol=0.02)
    assert answers.unique(dim=0).shape[0] > 150


def test_a_compiled_network_has_the_weights_of_its_source(tiny_network: nn.Module) -> None:
    theirs, ours = tiny_network.state_dict(), engine.compile_network(tiny_network, 64).state_dict()
    assert len(theirs) > 10
    for expected, weights in zip(theirs.values(), ours.values(), strict=True):
        assert torch.equal(weights, expected)


def test_any_number_of_pictures_is_answered_alike(tiny_network: nn.Module) -> None:
    compiled = engine.compile_network(tiny_network, 64)
    inputs = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = compiled(inputs)
    torch.testing.assert_close(together, tiny_network(inputs), rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.cat([compiled(one[None]) for one in inputs]), together, rtol=0.02, atol=0.02)


def test_without_openvino_pytorch_answers(monkeypatch: pytest.MonkeyPatch, classifier: Classifier) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _name: None)
    assert engine.best_engine() == "PyTorch"
    fallback = engine.load_fastest(DEFAULT_CHECKPOINT)
    size = classifier.preprocessing.input_size
    inputs = torch.zeros(1, 3, size, size)
    assert torch.equal(fallback.network(inputs), classifier.network(inputs))

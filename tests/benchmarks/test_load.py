"""Many visitors: real sessions with the real server."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from pictures import encode
from PIL import Image

from benchmarks.load import Scene, Shown, Tally, Visitor, crowd, draw
from benchmarks.page import running_server


async def ask_alone(address: str, pictures: list[bytes]) -> list[Shown]:
    async with Visitor(address) as visitor:
        return [await visitor.ask(f"my-secret-{number}.jpg", picture) for number, picture in enumerate(pictures)]


def test_nobody_gets_anothers_answer_and_the_log_gets_none(capfd: pytest.CaptureFixture[str]) -> None:
    """Eight visitors for four seconds; `benchmarks.load` does it for longer."""

    async def visit() -> None:
        pictures = [draw(seed) for seed in range(8)]
        alone = await ask_alone(address, pictures)
        assert len({shown.pictures for shown in alone}) == len(pictures)
        assert not any(shown.errors for shown in alone)
        tally = await crowd(Scene(address, process, pictures, alone), 8, 4)
        assert len(tally.seconds) >= 8
        assert (tally.wrong, tally.errors, tally.missing) == (0, 0, 0)
        (refused,) = await ask_alone(address, [b"no picture"])
        assert "not a picture in a format we read" in refused.errors[0]

    with running_server() as (address, process):
        asyncio.run(visit())
    assert "secret" not in capfd.readouterr().err  # part of every upload's name


def test_growth_is_read_from_the_settled_part() -> None:
    memory = [
        (float(second), 10 * second, (900 + second if second < 60 else 960 + second / 10)) for second in range(200)
    ]
    assert Tally(memory=memory).growth() == "10.0 ± 0.0"
    assert Tally(memory=memory[:60]).growth() == "–"


def test_who_waits_reads_that_it_waits(address: str) -> None:
    """Twelve visitors on the cores of this machine; up to three times, for a short wait is not shown."""
    slow_to_open = encode(Image.new("RGB", (6000, 6000)))

    async def visit() -> list[str]:
        async with AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(address)) for _ in range(12)]
            for start in (0, 12, 24):
                pictures = [slow_to_open + bytes([start + n]) for n in range(len(visitors))]  # each is another one
                await asyncio.gather(
                    *(visitor.ask("mine.png", one) for visitor, one in zip(visitors, pictures, strict=True))
                )
                texts = [text for visitor in visitors for text in visitor.spinners]
                if any("yours is waiting" in text for text in texts):
                    break
            return texts

    texts = asyncio.run(visit())
    assert any("yours is waiting" in text for text in texts)
    assert any("Classifying the picture" in text for text in texts)

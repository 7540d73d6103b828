"""Many visitors, and what they leave behind: real sessions with the real server."""

import asyncio
import resource
from contextlib import AsyncExitStack

from pictures import encode, noise

from bench_load import Scene, Shown, Visitor, crowd, draw
from bench_page import running_server


async def ask_alone(address: str, pictures: list[bytes]) -> list[Shown]:
    async with Visitor(address) as visitor:
        return [await visitor.ask(f"{number}.jpg", picture) for number, picture in enumerate(pictures)]


def test_nobody_gets_anothers_answer_or_heatmap() -> None:
    """Eight visitors for ten seconds; `bench_load.py` does it for longer."""

    async def visit() -> None:
        pictures = [draw(seed) for seed in range(12)]
        alone = await ask_alone(address, pictures)
        assert len({shown.pictures for shown in alone}) == len(pictures)
        assert not any(shown.errors for shown in alone)
        tally = await crowd(Scene(address, process, pictures, alone), 8, 10)
        assert len(tally.seconds) >= 8
        assert (tally.wrong, tally.errors) == (0, 0)

    with running_server() as (address, process):
        asyncio.run(visit())


def test_who_waits_reads_that_it_waits() -> None:
    async def visit() -> list[str]:
        async with AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(address)) for _ in range(12)]
            await asyncio.gather(*(visitor.ask(f"{n}.jpg", draw(n)) for n, visitor in enumerate(visitors)))
            return [text for visitor in visitors for text in visitor.spinners]

    with running_server() as (address, _):
        texts = asyncio.run(visit())
    assert any("yours is waiting" in text for text in texts)
    assert any("Looking at the picture" in text for text in texts)


def no_files() -> None:
    """Let this process write to no file: any attempt fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_uploads_never_touch_the_disk() -> None:
    """Of 9 MB, where web servers begin to use temporary files."""
    large = encode(noise(900, 600), "JPEG") + bytes(9_000_000)  # what is behind its end is no part of a JPEG
    with running_server(prepare=no_files) as (address, _):
        (shown,) = asyncio.run(ask_alone(address, [large]))
    assert shown.verdict
    assert not shown.errors

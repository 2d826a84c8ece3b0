"""Reading, in one event loop, what is made in another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from experts.relay import relayed


@pytest.fixture
def elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_items_come_in_order_and_errors_with_them(elsewhere) -> None:
    async def counting() -> AsyncIterator[int]:
        for number in range(5):
            assert asyncio.get_running_loop() is elsewhere
            yield number
        raise KeyError("five")

    async def read() -> list[int]:
        found = []
        with pytest.raises(KeyError, match="five"):
            async for number in relayed(counting, elsewhere):
                found.append(number)
        return found

    assert asyncio.run(read()) == [0, 1, 2, 3, 4]


def test_a_reader_that_leaves_cancels_what_is_made(elsewhere) -> None:
    ended = threading.Event()

    async def forever() -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def leave() -> None:
        reading = relayed(forever, elsewhere)
        assert await anext(reading) == 0
        await reading.aclose()

    asyncio.run(leave())
    assert ended.wait(10)


def test_an_end_from_outside_is_not_waited_for(elsewhere) -> None:
    async def forever() -> AsyncIterator[int]:
        yield 0
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.Event().wait()

    async def read() -> None:
        async for _ in relayed(forever, elsewhere):
            pass

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())

"""An asynchronous iterator of one event loop, read in another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def relayed(make: Callable[[], AsyncIterator[T]], loop: asyncio.AbstractEventLoop) -> AsyncGenerator[T]:
    """What the iterator yields in its own loop; its errors are raised here, and a reader that leaves cancels it.

    make: called in `loop`.

    Raises:
        asyncio.CancelledError: when somebody else cancels it there.
    """
    here, news = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def tell(kind: str, what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # of a loop in which nobody listens any more
            here.call_soon_threadsafe(news.put_nowait, (kind, what))

    async def listen() -> None:
        async for item in make():
            tell("item", item)

    def ended(task: Future[None]) -> None:
        tell("error", asyncio.CancelledError() if task.cancelled() else task.exception())

    listening = asyncio.run_coroutine_threadsafe(listen(), loop)
    listening.add_done_callback(ended)
    try:
        while True:
            kind, what = await news.get()
            if kind == "item":
                yield what
            elif what is None:
                return
            else:
                raise what
    finally:
        listening.cancel()

"""
Calls made at about the same time, carried out as one.

    call ─┐
    call ─┼─ up to `most`, or what comes within `seconds` ──► work([…]) ──► to each its own
    call ─┘

Whoever calls knows nothing of the others: it has an answer, an error and a deadline of its own.
"""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


class Gathering(Generic[Item, Result]):
    """
    Gathers single calls for a function that takes many.

    Args:
        work: one result, or exception, for each item, in the order of the items. What it
            raises is everybody's. It is not ended when those who wait for it give up.
        most: items in one call.
        seconds: how long the first one waits for others.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        most: int,
        seconds: float,
    ) -> None:
        self.most = most
        self._work = work
        self._seconds = seconds
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = copy_context()  # what is done for many is logged as nobody's own

    async def __call__(self, item: Item) -> Result:
        """
        The result for one item; raises what it came to.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self.most:
            self._begin()
        elif self._timer is None:
            self._timer = loop.call_later(self._seconds, self._begin)
        return await future

    async def aclose(self) -> None:
        """
        Give up whatever is under way.
        """
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Who has given up meanwhile needs no answer.
        calls = [call for call in self._waiting if not call[1].done()]
        self._waiting = []
        if calls:
            task = asyncio.get_running_loop().create_task(
                self._carry_out(calls), context=self._context.copy()
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, calls: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results: Sequence[Result | Exception] = await self._work([item for item, _ in calls])
        except Exception as error:  # noqa: BLE001 (it is raised where somebody waits for it)
            results = [error] * len(calls)
        for (_, future), result in zip(calls, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

"""
The business transaction of our own contenders, again and again: with an event and without.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Transact = Callable[[int, str | None], Awaitable[None]]
    """Of the row that it changes; with an event if there is a key for it."""

ROWS = 10_000

CERTIFICATION = (
    "UPDATE bench.certifications SET status = 'expired', changed_at = now() WHERE id = %s"
)
MENTOR = "UPDATE bench.mentors SET visible = NOT visible, version = version + 1 WHERE id = %s"


async def produce(clients: Sequence[Transact], *, seconds: float, slice_seconds: float) -> None:
    """
    All clients at once, in alternating slices without and with; print what came out.

    The first slice of each is for getting warm.
    """
    taken: dict[bool, list[float]] = defaultdict(list)
    spent: dict[bool, float] = defaultdict(float)
    slices = max(4, round(seconds / slice_seconds))
    for number in range(slices):
        enqueueing = bool(number % 2)
        began = time.monotonic()
        done = await asyncio.gather(
            *(_slice(one, enqueueing=enqueueing, until=began + slice_seconds) for one in clients)
        )
        if number > 1:
            taken[enqueueing] += [duration for durations in done for duration in durations]
            spent[enqueueing] += time.monotonic() - began
    _print(
        {
            "without": len(taken[False]) / spent[False],
            "with": len(taken[True]) / spent[True],
            "milliseconds_without": median(taken[False]) * 1000,
            "milliseconds_with": median(taken[True]) * 1000,
        }
    )


async def _slice(transact: Transact, *, enqueueing: bool, until: float) -> list[float]:
    durations = []
    while (began := time.monotonic()) < until:
        await transact(_row(), str(uuid4()) if enqueueing else None)
        durations.append(time.monotonic() - began)
    return durations


async def tick(
    keys: Sequence[str],
    *,
    transact: Transact,
    wake: Callable[[], Awaitable[None]],
    per_second: float,
) -> None:
    """
    One transaction with an event for each key, at a steady pace; print when each was committed.
    """
    committed = []
    began = time.monotonic()
    for number, key in enumerate(keys):
        await asyncio.sleep(began + number / per_second - time.monotonic())
        await transact(_row(), key)
        committed.append((time.monotonic_ns(), key))
        await wake()
    _print(committed)


def _row() -> int:
    return random.randint(1, ROWS)  # noqa: S311 (no secret)


def _print(document: object) -> None:
    sys.stdout.write(json.dumps(document) + "\n")

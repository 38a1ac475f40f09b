"""
Which measures there are, and a run of them.
"""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tests.bench.measure import Measure, raise_if_stopped
from tests.bench.report import Taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.bench.measure import Figure, Ground

MODULES = (
    "drain",
    "floor",
    "enqueue",
    "latency",
    "expire",
    "remind",
    "flatness",
    "endurance",
    "viewers",
)
"""In the order in which they run; see `tests.bench.measure` for how a module joins."""

MEASURE_SECONDS = 1500.0
"""No measure takes longer."""


def all_measures() -> list[Measure]:
    """
    Those of all modules that are here.
    """
    return [
        measure
        for name in MODULES
        if find_spec(f"tests.bench.{name}")
        for measure in _measures_of(name)
    ]


def _measures_of(name: str) -> Sequence[Measure]:
    try:
        measures: Sequence[Measure] = import_module(f"tests.bench.{name}").MEASURES
    except Exception as error:  # noqa: BLE001 (the report has to show it, and the others go on)
        reason = error

        async def fail(_: Ground) -> Sequence[Figure]:
            raise reason

        return [Measure(name=name, question=f"What is in `{name}`?", run=fail)]
    return measures


async def run(ground: Ground, measures: Sequence[Measure]) -> AsyncIterator[Taken]:
    """
    Each measure in turn; one that fails does not keep the others from theirs.
    """
    for measure in measures:
        began = time.monotonic()
        figures: Sequence[Figure] = []
        failed = ""
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                figures = await measure.run(ground)
        except Exception as error:  # noqa: BLE001 (whatever it is, the report has to show it)
            raise_if_stopped()
            failed = f"{type(error).__name__}: {error}"
            ground.complain(f"{measure.name}: {failed}")
        yield Taken.of(measure, figures, seconds=time.monotonic() - began, failed=failed)

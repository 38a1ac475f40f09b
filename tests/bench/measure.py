"""
What a measure is, what it has to work with, and what it hands back.

A module joins the suite in two steps. It defines

    MEASURES = (Measure(name="drain", run=…, goals=(…,)),)

and its name goes into `MODULES` of `tests.bench.suite`. `run` is given the `Ground` (a
PostgreSQL, the far side, contenders, how long to measure) and returns `Figure`s: what was
measured, of whom, in which unit, once for each round. Goals say how figures have to compare;
see `tests.bench.goals`. Most measures are one call of `Ground.in_turns`, which has every
contender measured once in each round and goes on when one fails.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from tests.bench.processes import ProcessFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from tests.bench.contender import Contender
    from tests.bench.far_side import FarSide
    from tests.bench.goals import Goal
    from tests.bench.postgres import Databases

TURN_SECONDS = 60.0
"""No turn takes longer, or it has failed."""

FAILURES = 2
"""Whoever failed so often in one setting is left out of its other rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """
    How often, how long and in which settings to measure.

    Args:
        quick: to see that everything works; the figures are not worth much.
        drain_seconds, enqueue_seconds, latency_seconds: of one turn, starting and stopping
            processes apart.
        concurrencies: requests at once.
        clients: business transactions at once.
    """

    rounds: int
    quick: bool
    drain_seconds: float
    enqueue_seconds: float
    latency_seconds: float
    concurrencies: tuple[int, ...]
    clients: tuple[int, ...]

    @classmethod
    def full(cls, *, rounds: int) -> Scale:
        """
        What figures are reported from.
        """
        return cls(
            rounds=rounds,
            quick=False,
            drain_seconds=1.8,
            enqueue_seconds=1.8,
            latency_seconds=4.0,
            concurrencies=(10, 50, 100),
            clients=(1, 4, 16),
        )

    @classmethod
    def short(cls, *, rounds: int) -> Scale:
        """
        What fits into three minutes.
        """
        return cls(
            rounds=rounds,
            quick=True,
            drain_seconds=1.2,
            enqueue_seconds=0.8,
            latency_seconds=2.0,
            concurrencies=(10,),
            clients=(1, 16),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """
    One quantity of one contender in one setting.

    Args:
        what: the setting, e.g. `single PATCH, 0 ms, concurrency 10`.
        who: the contender's name.
        unit: says what was measured, too: `events/s`.
        rounds: one value for each round, in their order; None where it failed.
        failed: why, if it ever did.
    """

    what: str
    who: str
    unit: str
    rounds: Sequence[float | None]
    failed: str = ""

    @property
    def median(self) -> float | None:
        """
        Of the rounds that did not fail.
        """
        values = [value for value in self.rounds if value is not None]
        return median(values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """
    What a measure has to work with.

    Args:
        contenders: those that take part.
        advance: told what was just done, once a turn.
        complain: told what failed.
        remembered: notes of a measure for its next call, such as how fast somebody is.
    """

    databases: Databases
    far_side: FarSide
    contenders: Sequence[Contender]
    scale: Scale
    advance: Callable[[str], None]
    complain: Callable[[str], None]
    remembered: dict[str, float] = field(default_factory=dict)

    def among(self, names: Sequence[str]) -> list[Contender]:
        """
        Those of this name that take part.
        """
        return [one for one in self.contenders if one.name in names]

    async def in_turns(
        self,
        what: str,
        contenders: Sequence[Contender],
        turn: Callable[[Contender], Awaitable[Mapping[str, float]]],
    ) -> list[Figure]:
        """
        Measure each contender once in each round, in another order each time.

        Args:
            what: the setting.
            turn: measures one contender once; by unit, what came out.
        """
        taken: dict[str, list[Mapping[str, float]]] = defaultdict(list)
        failures: dict[str, list[str]] = defaultdict(list)
        for number in range(self.scale.rounds):
            first = number % max(1, len(contenders))
            for one in [*contenders[first:], *contenders[:first]]:
                values: Mapping[str, float] = {}
                if len(failures[one.name]) < FAILURES:
                    values = await self._turn(what, one, turn, failures[one.name])
                taken[one.name].append(values)
                self.advance(f"{what}: {one.name}")
        return [
            figure
            for one in contenders
            for figure in _figures(what, one.name, taken[one.name], failures[one.name])
        ]

    async def _turn(
        self,
        what: str,
        contender: Contender,
        turn: Callable[[Contender], Awaitable[Mapping[str, float]]],
        failures: list[str],
    ) -> Mapping[str, float]:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                return await turn(contender)
        except ProcessFailedError as error:
            failures.append(str(error))
        except Exception as error:  # noqa: BLE001 (whatever it is, the others go on)
            raise_if_stopped()
            failures.append(f"{type(error).__name__}: {error}")
        self.complain(f"{what}: {contender.name}: {failures[-1]}")
        return {}


def raise_if_stopped() -> None:
    """
    A Ctrl+C reaches PostgreSQL, too, so that cleaning up may fail in another way.

    Raises:
        CancelledError: somebody stopped the run.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _figures(
    what: str, who: str, taken: Sequence[Mapping[str, float]], failures: Sequence[str]
) -> list[Figure]:
    units = dict.fromkeys(unit for values in taken for unit in values) or {"": None}
    return [
        Figure(
            what=what,
            who=who,
            unit=unit,
            rounds=tuple(values.get(unit) for values in taken),
            failed=failures[0] if failures else "",
        )
        for unit in units
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """
    One question, and what has to be the answer.

    Args:
        name: for the command line.
        question: one sentence for the report.
        run: takes the figures.
        goals: what they are compared with.
        turns: how many times `Ground.advance` is called, for the progress bar.
    """

    name: str
    question: str
    run: Callable[[Ground], Awaitable[Sequence[Figure]]]
    goals: Sequence[Goal] = ()
    turns: Callable[[Ground], int] = lambda _: 1

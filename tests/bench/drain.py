"""
How fast a backlog goes out, and at what cost: events per second, CPU seconds per 1,000 events.

    start ─► first arrival ─► everybody is warm ─►── counted here ──►─ before the backlog ends

Each turn has as many events as its contender needs for that, which is found out in the first
round: a fast one is measured again until there were enough. A turn counts only if what arrived
is durably done soon afterwards.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.bench.contenders import PYTHON_PEERS, PYTHON_PEERS_BY_AIOHTTP
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.bench.processes import ProcessFailedError, cpu_seconds, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.bench.contender import Contender
    from tests.bench.processes import Process

RATE = "events/s"
CPU = "CPU s per 1,000 events"

START_SECONDS = 20.0
"""Until a worker is warm."""

LIMIT_SECONDS = 10.0
"""No turn is counted for longer."""

DURABLE_SECONDS = 5.0
"""Until what arrived has to be done durably."""

LOOK_SECONDS = 0.02
"""Between looks at the counters."""

WARM_SECONDS = 0.8
"""From the first arrival; connections get faster in it."""

LONG_WARM_SECONDS = 2.0
"""The same where Node takes part: it compiles for some 5,000 events."""

WARM_REQUESTS = 3
"""Of each connection, before it counts."""

FIRST_GUESS = 300.0
"""Events per second, of whom nothing is known yet."""

GROWTH = 2.0
"""A guess that was too low is at least doubled."""

SPARE = 1.3
"""So many times the events that are expected to go out."""

NEARLY_ALL = 0.95
"""Of the backlog; the last events go out more slowly."""

SHORTEST = 0.8
"""Of the wanted time; a shorter turn is taken again, with more events."""

SINGLE = (
    "ours",
    "bare:httpx",
    "bare:aiohttp",
    "bare:claim100",
    *PYTHON_PEERS,
    *PYTHON_PEERS_BY_AIOHTTP,
)
BATCHED = (
    "ours:batch100",
    "graphile-worker:tuned",
    "pg-boss",
    "pgqueuer",
    "pgqueuer:b100",
    "faststream-outbox:tuned",
)

BEST_CONCURRENCY = {"graphile-worker:tuned": 50, "pg-boss": 100}
"""Requests at once with which a peer is at its best; 10 for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    What the far side and the worker are told.

    Args:
        concurrency: requests at once; None for what is best for each.
        warm_seconds: from the first arrival until it counts.
    """

    what: str
    latency_ms: float
    concurrency: int | None
    warm_seconds: float = WARM_SECONDS

    def concurrency_of(self, contender: Contender) -> int:
        """
        Requests at once of this contender.
        """
        return self.concurrency or BEST_CONCURRENCY.get(contender.name, 10)


def single(concurrency: int, *, latency_ms: float = 0) -> Setting:
    """
    One event, one PATCH.
    """
    return Setting(
        what=f"single PATCH, {latency_ms:g} ms, concurrency {concurrency}",
        latency_ms=latency_ms,
        concurrency=concurrency,
    )


SLOW = single(50, latency_ms=50)
BATCH = Setting(
    what="$batch of 100, 0 ms", latency_ms=0, concurrency=None, warm_seconds=LONG_WARM_SECONDS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """
    How far it is, and what was used until now.

    Args:
        seconds: of the clock, at the last arrival.
        since_first: seconds from the first arrival to the last.
        cpu: seconds of worker and PostgreSQL; too dear to be read at every look.
    """

    arrived: int
    seconds: float
    since_first: float
    cpu: float = 0.0


async def drain(ground: Ground, setting: Setting, contender: Contender) -> Mapping[str, float]:
    """
    One turn; the first one of a fast contender is taken again until it is long enough.
    """
    wanted = ground.scale.drain_seconds
    rates = ground.remembered
    general = f"{contender.name}, {setting.latency_ms:g} ms"
    special = f"{contender.name}, {setting.what}"
    while True:
        rate = rates.get(special) or rates.get(general) or FIRST_GUESS
        events = WARM_REQUESTS * setting.concurrency_of(contender)
        events += round(rate * (setting.warm_seconds + wanted) * SPARE)
        first, last = await _drain(ground, setting, contender, events)
        seconds, arrived = last.seconds - first.seconds, last.arrived - first.arrived
        if seconds >= SHORTEST * wanted:
            rates[special] = rates[general] = arrived / seconds
            return {RATE: arrived / seconds, CPU: (last.cpu - first.cpu) / arrived * 1000}
        rates[special] = max(GROWTH * rate, last.arrived / max(last.since_first, LOOK_SECONDS))


async def _drain(
    ground: Ground, setting: Setting, contender: Contender, events: int
) -> tuple[Moment, Moment]:
    """
    From when the worker is warm until the wanted time is over, or nearly all has arrived.
    """
    concurrency = setting.concurrency_of(contender)
    keys = [str(uuid4()) for _ in range(events)]

    def is_warm(now: Moment) -> bool:
        everybody = now.arrived >= WARM_REQUESTS * concurrency
        return is_nearly_done(now) or (everybody and now.since_first >= setting.warm_seconds)

    def is_nearly_done(now: Moment) -> bool:
        return now.arrived >= NEARLY_ALL * events

    def is_over(now: Moment) -> bool:
        return is_nearly_done(now) or now.seconds - first.seconds >= ground.scale.drain_seconds

    async with ground.databases.fresh(contender) as url:
        await asyncio.to_thread(contender.fill, url, keys)
        ground.far_side.reset(latency_ms=setting.latency_ms)
        environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
        command = contender.worker(concurrency=concurrency)
        async with running(command, environment, quiet=True) as worker:
            first = await _moment(ground, worker, is_warm, START_SECONDS)
            last = await _moment(ground, worker, is_over, LIMIT_SECONDS)
            if not is_warm(first) or last.arrived == first.arrived < NEARLY_ALL * events:
                raise ProcessFailedError(
                    f"{last.arrived} of {events} events arrived, then no more. {worker.said}"
                )
            await _must_be_durable(ground, contender, url, events)
    return first, last


async def arrived(ground: Ground, worker: Process, number: int, seconds: float) -> Moment:
    """
    The moment when so many have arrived, or the time is over.
    """
    return await _moment(ground, worker, lambda now: now.arrived >= number, seconds)


async def _moment(
    ground: Ground, worker: Process, condition: Callable[[Moment], bool], seconds: float
) -> Moment:
    """
    The moment when something is so, or the time is over.
    """
    ends_at = time.monotonic() + seconds
    while True:
        counted = ground.far_side.counted()
        now = Moment(
            arrived=counted["updates"],
            seconds=counted["last_ns"] / 1e9,
            since_first=(counted["last_ns"] - counted["first_ns"]) / 1e9,
        )
        if condition(now) or time.monotonic() > ends_at:
            return replace(now, cpu=cpu_seconds(worker.pid, ground.databases.server.pid))
        worker.must_run()
        await asyncio.sleep(LOOK_SECONDS)


async def _must_be_durable(ground: Ground, contender: Contender, url: str, events: int) -> None:
    """
    What has arrived has to be done durably soon: a worker that kept it in mind is not faster.
    """
    came = min(events, ground.far_side.counted()["updates"])
    ends_at = time.monotonic() + DURABLE_SECONDS
    while (left := await asyncio.to_thread(contender.left, url)) > events - came:
        if time.monotonic() > ends_at:
            raise ProcessFailedError(
                f"{came} of {events} events arrived, but {left} are not durably done"
                f" {DURABLE_SECONDS:g} s later."
            )
        await asyncio.sleep(LOOK_SECONDS)


async def drain_single(ground: Ground) -> list[Figure]:
    """
    Each concurrency, and answers that take their time.
    """
    settings = [*(single(one) for one in ground.scale.concurrencies), SLOW]
    return [figure for setting in settings for figure in await _measure(ground, setting, SINGLE)]


async def drain_batches(ground: Ground) -> list[Figure]:
    """
    Many events in one request, where somebody can do that.
    """
    return await _measure(ground, BATCH, BATCHED)


async def _measure(ground: Ground, setting: Setting, names: Sequence[str]) -> list[Figure]:
    return await ground.in_turns(
        setting.what, ground.among(names), lambda contender: drain(ground, setting, contender)
    )


def _goals_of_single() -> Iterator[Goal]:
    for concurrency in (10, 50, 100):
        what = single(concurrency).what
        limit = Bound(factor=0.9, whom=("bare:httpx",), called="bare:httpx")
        yield Goal(what=what, unit=RATE, bounds=[limit])
        yield Goal(what=what, unit=RATE, bounds=[_best_python(1.6)])
        yield Goal(what=what, unit=CPU, most=True, bounds=[_best_python(0.7)])
    full = Bound(factor=0.9, called="1,000 (50 requests / 50 ms)", value=1000)
    yield Goal(what=SLOW.what, unit=RATE, bounds=[full])


def _best_python(factor: float) -> Bound:
    return Bound(factor=factor, whom=PYTHON_PEERS, called="best Python peer")


_TUNED = "graphile-worker:tuned"

MEASURES = (
    Measure(
        name="drain",
        question="How fast does a backlog go out, one request for each event, and at what cost?",
        run=drain_single,
        goals=tuple(_goals_of_single()),
        turns=lambda ground: (
            (len(ground.scale.concurrencies) + 1) * ground.scale.rounds * len(ground.among(SINGLE))
        ),
    ),
    Measure(
        name="batches",
        question="And with 100 events in one request, and peers at what suits them best?",
        run=drain_batches,
        goals=(
            Goal(
                what=BATCH.what,
                unit=RATE,
                who="ours:batch100",
                bounds=[Bound(factor=1, whom=(_TUNED,), called=_TUNED)],
            ),
            Goal(what=BATCH.what, unit=RATE, who="ours:batch100", bounds=[_best_python(30)]),
        ),
        turns=lambda ground: ground.scale.rounds * len(ground.among(BATCHED)),
    ),
)

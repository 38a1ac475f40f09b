"""
How close to Dynamics' own limits a backlog goes, and how little of it is refused.

The sandbox enforces the service protection limits of Dataverse: 6,000 requests in a sliding
window of 300 s, 52 at once, each answered after 100 ms. The fastest schedule is to use up each
window at once and to wait for the next: 904 s for 20,000 requests. Time cannot be compressed
here, because Retry-After knows whole seconds alone, so it is no part of the suite.

    python -m tests.bench.limits       takes a quarter of an hour

Source: Microsoft Learn, "Service protection API limits".
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.bench import postgres
from tests.bench.contenders.ours import Ours
from tests.bench.contenders.ours_worker import CLIENT, SECRET, TENANT
from tests.bench.measure import Figure
from tests.bench.processes import ProcessFailedError, running
from worker.dynamics.sandbox.command import Options, build
from worker.dynamics.sandbox.limits import Limits

if TYPE_CHECKING:
    from tests.bench.postgres import Databases
    from tests.bench.processes import Process
    from worker.dynamics.sandbox.ledger import Entry
    from worker.dynamics.sandbox.sandbox import Sandbox

OURS = Ours(name="ours")

AT_ONCE = 8
"""Requests of the worker: its default."""

SECONDS = "s ÷ fastest schedule"
REFUSED = "% of requests refused"

TOO_MANY = 429

START_SECONDS = 10.0
"""For a worker to begin."""

LOOK_SECONDS = 0.1
"""Between looks at the ledger."""

PATIENCE = 3.0
"""So many times the fastest schedule, and it has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """
    So many events, what is allowed, and how long an answer takes.
    """

    events: int
    limits: Limits
    latency_seconds: float

    @property
    def what(self) -> str:
        """
        For people.
        """
        limits = self.limits
        return (
            f"{self.events:,} events, {limits.requests:,} requests in {limits.window_seconds:g} s,"
            f" {self.latency_seconds * 1000:g} ms"
        )

    @property
    def fastest_seconds(self) -> float:
        """
        What no client can be faster than.
        """
        assert self.limits.requests
        assert self.limits.concurrency
        windows = ceil(self.events / self.limits.requests) - 1
        rest = self.events - windows * self.limits.requests
        pace = self.limits.concurrency / self.latency_seconds
        return windows * self.limits.window_seconds + rest / pace


LOAD = Load(events=20_000, limits=Limits(), latency_seconds=0.1)


async def under(load: Load, databases: Databases) -> list[Figure]:
    """
    How long it took, and how much was refused.
    """
    options = Options(
        tenant=TENANT,
        client_id=CLIENT,
        client_secret=SECRET,
        latency_seconds=load.latency_seconds,
        limits=load.limits,
        accept_any_row=True,
    )
    sandbox = build(options)
    async with databases.fresh(OURS) as url:
        await asyncio.to_thread(OURS.fill, url, [str(uuid4()) for _ in range(load.events)])
        async with sandbox.serve() as serving:
            environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": serving.url}
            command = OURS.worker(concurrency=AT_ONCE)
            async with running(command, environment, quiet=True) as worker:
                await _taken(sandbox, load, worker)
    entries = [entry for entry in sandbox.ledger.entries if entry.kind == "data"]
    seconds = max(map(_end, entries)) - min(entry.started_at for entry in entries)
    refused = sum(1 for entry in entries if entry.status == TOO_MANY)
    return [
        Figure(
            what=load.what,
            who="ours",
            unit=SECONDS,
            rounds=[seconds / load.fastest_seconds],
        ),
        Figure(what=load.what, who="ours", unit=REFUSED, rounds=[refused / len(entries) * 100]),
    ]


async def _taken(sandbox: Sandbox, load: Load, worker: Process) -> None:
    """
    Wait until every event has been taken.

    Raises:
        ProcessFailedError: that would take far too long.
    """
    ends_at = time.monotonic() + PATIENCE * load.fastest_seconds + START_SECONDS
    seen = taken = 0
    while taken < load.events:
        if time.monotonic() > ends_at:
            raise ProcessFailedError(f"{taken} of {load.events} events were taken in time.")
        worker.must_run()
        await asyncio.sleep(LOOK_SECONDS)
        new = sandbox.ledger.since(seen)
        seen += len(new)
        taken += sum(1 for entry in new if entry.kind == "data" and entry.applied)


def _end(entry: Entry) -> float:
    return entry.finished_at or entry.started_at


async def _main() -> None:
    async with postgres.running() as databases:
        for figure in await under(LOAD, databases):
            sys.stdout.write(f"{figure.what}: {figure.median:.2f} {figure.unit}\n")


if __name__ == "__main__":
    asyncio.run(_main())

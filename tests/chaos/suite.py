"""
What is run, how often at each push and in the full run, and in bouts of which size.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.chaos.scenarios.bout import Bout, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    One way of breaking things.

    Args:
        name: for the command line.
        what: a fault of it, in the plural.
        where: module and function.
        push, full: faults at each push, and in the full run.
        bout: faults in one process with one seed.
    """

    name: str
    what: str
    where: str
    push: int
    full: int
    bout: int

    async def run(self, bout: Bout) -> Result:
        """
        Run one bout in this process.
        """
        module, _, function = self.where.partition(":")
        scenario: Callable[[Bout], Awaitable[Result]] = getattr(
            import_module(f"tests.chaos.scenarios.{module}"), function or "run"
        )
        return await scenario(bout)

    def bouts(self, *, full: bool, seed: int) -> Iterator[tuple[int, int]]:
        """
        (seed, count) of each bout.
        """
        left = self.full if full else self.push
        while left > 0:
            count = min(left, self.bout)
            yield seed, count
            left -= count
            seed += 1


SUITE = (
    Scenario(
        name="mutants",
        what="mutants of the product",
        where="thought:run_mutants",
        push=10,
        full=1_000,  # all there are
        bout=1_000,
    ),
    Scenario(
        name="restarts",
        what="crashes of PostgreSQL under load",
        where="restarts",
        push=5,
        full=500,
        bout=100,
    ),
    Scenario(
        name="lines",
        what="faults of either line, one by one",
        where="network:run_lines",
        push=18,
        full=54,
        bout=18,
    ),
    Scenario(
        name="schedules",
        what="random schedules on PostgreSQL, 30 steps",
        where="thought:run_on_postgres",
        push=300,
        full=10_000,
        bout=1_000,
    ),
    Scenario(
        name="kills",
        what="SIGKILLs, failpoints × answers",
        where="kills",
        push=80,
        full=1_000,
        bout=200,
    ),
    Scenario(
        name="mixes",
        what="random mixes on both lines",
        where="network:run_mixes",
        push=6,
        full=1_000,
        bout=100,
    ),
    Scenario(
        name="outages",
        what="hours of outage or wrong set-up, in 10 s each",
        where="outages",
        push=2,
        full=10,
        bout=5,
    ),
    Scenario(
        name="answers", what="answers of Dynamics", where="answers", push=31, full=93, bout=31
    ),
    Scenario(
        name="stops", what="SIGSTOPs for 1.5 leases", where="stops", push=8, full=200, bout=50
    ),
    Scenario(
        name="cold",
        what="SIGKILLs of cold processes",
        where="signals:run_cold",
        push=4,
        full=100,
        bout=50,
    ),
    Scenario(
        name="nightly",
        what="SIGKILLs of night runs, eight at once",
        where="nights",
        push=10,
        full=100,
        bout=100,
    ),
    Scenario(
        name="batches",
        what="SIGKILLs with batches under way",
        where="batches",
        push=5,
        full=100,
        bout=50,
    ),
    Scenario(
        name="late",
        what="requests that land after a newer one",
        where="late",
        push=8,
        full=100,
        bout=20,
    ),
    Scenario(
        name="poison",
        what="events that kill whoever touches them",
        where="poison",
        push=2,
        full=30,
        bout=5,
    ),
    Scenario(
        name="pooler-kills",
        what="SIGKILLs behind PgBouncer",
        where="pooler:run_kills",
        push=20,
        full=200,
        bout=100,
    ),
    Scenario(
        name="pooler-restarts",
        what="crashes of PostgreSQL behind PgBouncer",
        where="pooler:run_restarts",
        push=3,
        full=50,
        bout=25,
    ),
    Scenario(
        name="database",
        what="failovers, lack of connections, killed backends, new schemas",
        where="database",
        push=6,
        full=60,
        bout=30,
    ),
    Scenario(
        name="signals",
        what="SIGTERMs, once and twice, and SIGINTs",
        where="signals",
        push=4,
        full=100,
        bout=50,
    ),
    Scenario(
        name="clock", what="workers with a wrong clock", where="clock", push=1, full=12, bout=6
    ),
    Scenario(
        name="disk",
        what="times the disk was full",
        where="database:run_full_disk",
        push=1,
        full=10,
        bout=5,
    ),
    Scenario(
        name="model",
        what="schedules of the deterministic model",
        where="thought:run_on_model",
        push=2_000,
        full=100_000,
        bout=25_000,
    ),
)
"""Long ones first, so that no lane is left with one at the end."""


def find(name: str) -> Scenario:
    """
    A scenario by its name; KeyError if there is none.
    """
    return {scenario.name: scenario for scenario in SUITE}[name]

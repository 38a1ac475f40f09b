"""
The schedules themselves: that they run, repeat, and catch an outbox that is broken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from tests.chaos import schedules
from tests.chaos.model import Claim, Gate, New, Outbox, Row, state_of
from tests.chaos.schedule_mirror import Mirror, connected
from tests.chaos.schedule_random import run_schedule, take_step
from tests.chaos.schedule_watch import ViolationError
from tests.chaos.schedule_world import World

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from outbox.gate import GateState
    from outbox.outcome import Ending, GateReason, Outcome
    from tests.chaos.schedule_mirror import Database
    from tests.chaos.schedule_random import Step

MODEL_SCHEDULES = 400
POSTGRES_SCHEDULES = 25
CONTROL_SCHEDULES = 400
"""Each of the broken outboxes has to be caught within so many."""


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """
    Connections to a migrated database.
    """
    with connected(database_url) as opened:
        yield opened


def test_no_schedule_on_the_model_violates_an_invariant() -> None:
    """
    Whatever happens to workers, people, requests and the clock; and in the end all heals.
    """
    told: list[int] = []

    count = schedules.run_on_model(first_seed=0, count=MODEL_SCHEDULES, advance=told.append)

    assert count == sum(told) == MODEL_SCHEDULES


def test_a_real_outbox_does_what_the_model_does(database_url: str) -> None:
    """
    Every row is compared after every transaction, and the watch looks on.
    """
    told: list[int] = []

    count = schedules.run_on_postgres(
        database_url, seed=1, count=POSTGRES_SCHEDULES, advance=told.append
    )

    assert count == sum(told) >= POSTGRES_SCHEDULES


def test_a_seed_is_a_schedule() -> None:
    """
    The same steps lead to the same rows, so that what was found can be looked at again.
    """
    for seed in range(20):
        (one, steps), (other, same) = (run_schedule(seed, steps=30) for _ in range(2))
        assert steps == same
        assert state_of(one.outbox) == state_of(other.outbox)
    assert run_schedule(1, steps=30)[1] != run_schedule(2, steps=30)[1]


def test_on_a_real_outbox_the_same_seed_gives_the_same_schedules(database: Database) -> None:
    """
    Hypothesis chooses from the seed alone.
    """

    def histories(seed: int) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = []
        schedules.run_machines(
            database,
            seed=seed,
            count=4,
            steps=15,
            over=lambda world: states.append(state_of(world.outbox)),
        )
        return states

    assert histories(1) == histories(1) != histories(2)


@pytest.mark.parametrize("seed", range(3))
def test_what_runs_on_the_model_runs_on_a_real_outbox(database: Database, seed: int) -> None:
    """
    A schedule that violated something on the model can be seen on the database.
    """
    imagined, _ = run_schedule(seed, steps=30)
    real, _ = run_schedule(seed, steps=30, outbox=lambda: Mirror(database))

    assert state_of(real.outbox) == state_of(imagined.outbox)


def test_a_violation_says_how_to_see_it_again() -> None:
    """
    The invariant, the seed, every step, and a command.
    """
    violation = first_violation(TokenIsIgnored)

    assert violation.seed is not None
    assert violation.steps
    assert "S7" in str(violation)
    assert f"--seed {violation.seed}" in str(violation)
    assert f"{len(violation.steps)}. " in str(violation)


A_RESULT_IS_WRITTEN_LATE: Sequence[Step] = (
    ("change_minds", [("a", 0)]),
    ("turn", 0, 1),
    ("fly", 0, "no answer", 150.0),
    ("turn", 0, 1),
    ("change_minds", [("a", 1)]),
    ("turn", 0, 1),
    ("fly", 0, "delivered", 0.0),
    ("wait", 160.0),
    ("turn", 0, 1),
    ("heal",),
)
"""The old state's request arrives after the new one's, before anybody has written the result."""


def test_a_late_request_has_not_the_last_word_because_a_result_was_written_late(
    database: Database,
) -> None:
    """
    A worker has delivered, and cannot write that down until the doubt is past.
    """
    world = World(Mirror(database))

    for step in A_RESULT_IS_WRITTEN_LATE:
        take_step(world, step)

    assert world.shown == {"a": 2}


# ---------------------------------------------------------------------- negative controls


class TokenIsIgnored(Outbox):
    """
    Settles for whoever asks.
    """

    @override
    def holds(self, row: Row, claim: Claim) -> bool:
        return row.id == claim.id


class AttemptsCountLater(Outbox):
    """
    A claim is no attempt.
    """

    @override
    def attempts_at_claim(self, row: Row, *, held_back: bool) -> int:
        return row.attempts


class LeasesAreIgnored(Outbox):
    """
    Claims what is in somebody's hands.
    """

    @override
    def due(self) -> list[Row]:
        return list(self.rows.values())


class GateIsIgnored(Outbox):
    """
    Claims through a closed gate.
    """

    @override
    def gate_state(self) -> GateState:
        return "open"


class EverybodyProbes(Outbox):
    """
    A half-open gate is open.
    """

    @override
    def gate_state(self) -> GateState:
        state = super().gate_state()
        return "open" if state == "half-open" else state


class OperatorIsOverruled(Outbox):
    """
    An outage takes the place of a person's word.
    """

    @override
    def may_close(self, gate: Gate, reason: GateReason) -> bool:
        return True


class OutagesBurnAttempts(Outbox):
    """
    Attempts from before the gate closed still count.
    """

    @override
    def held_back(self, row: Row) -> bool:
        return False


class OlderVersionsWin(Outbox):
    """
    The last one to come is delivered.
    """

    @override
    def replaces(self, new: New, row: Row) -> bool:
        return True


class ReplacingTakesTheLease(Outbox):
    """
    A newer version frees an event that is in flight.
    """

    @override
    def replaced(self, row: Row, new: New, created_at: float) -> Row:
        free = row._replace(token=None, claimed_version=None, claimed_by=None)
        return super().replaced(free, new, created_at)


class NothingIsDoubted(Outbox):
    """
    A request without an answer counts as one that never was.
    """

    @override
    def doubt_unanswered(self, claim: Claim) -> None:
        pass


class AbandonedIsNotDoubted(Outbox):
    """
    A worker that died counts as one that never sent.
    """

    @override
    def doubt_abandoned(self, key: str, version: int) -> None:
        pass


class DeliveredIsTheEnd(Outbox):
    """
    What came during the flight is forgotten.
    """

    @override
    def moved_on(self, row: Row, claim: Claim) -> bool:
        return False


class DeadIsForgotten(Outbox):
    """
    What is given up leaves no trace.
    """

    @override
    def log(self, claim: Claim, ending: Ending, outcome: Outcome) -> None:
        if ending != "dead":
            super().log(claim, ending, outcome)


class OldestFirst(Outbox):
    """
    Showing may go before hiding.
    """

    @override
    def order(self, row: Row) -> tuple[float, ...]:
        return (row.available_at, row.id)


BROKEN: dict[type[Outbox], str] = {
    TokenIsIgnored: "S7",
    AttemptsCountLater: "S8",
    LeasesAreIgnored: "S6",
    GateIsIgnored: "S10",
    EverybodyProbes: "S10",
    OperatorIsOverruled: "S10",
    OutagesBurnAttempts: "S10",
    OlderVersionsWin: "S23",
    ReplacingTakesTheLease: "S23",
    NothingIsDoubted: "S12",
    AbandonedIsNotDoubted: "S12",
    DeliveredIsTheEnd: "S3",
    DeadIsForgotten: "S3",
    OldestFirst: "S14",
}


def first_violation(broken: type[Outbox]) -> ViolationError:
    """
    What the first schedule says that notices.
    """
    for seed in range(CONTROL_SCHEDULES):
        try:
            run_schedule(seed, steps=30, outbox=broken)
        except ViolationError as violation:
            return violation
    pytest.fail(f"No schedule noticed {broken.__name__}.")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_outbox_is_caught(broken: type[Outbox]) -> None:
    """
    One rule is broken, and the schedules name the invariant that it stood for.
    """
    assert first_violation(broken).invariant == BROKEN[broken]

"""
A model of the outbox: what its SQL means, in memory, without a database and without waiting.

Each method is one transaction of `outbox.store`, `outbox.gate` or the relay, each rule in it
a small method of its own, so that a test can break one of them. Times are plain seconds that
only `pass_time` moves; besides, every transaction takes a moment, so that nothing but
one transaction's work happens at the same time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from tenacity import wait_incrementing

from outbox.gate import ALL_REASONS
from outbox.outcome import Dead, Deferred, Delivered, Outcome, Retry, Skipped
from outbox.retry import RetryPolicy
from outbox.store import KEEP_DOUBTS_SECONDS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from outbox.breaker import Closing
    from outbox.gate import GateState
    from outbox.outcome import Ending, GateReason

LEASE_SECONDS = 60.0
DOUBT_SECONDS = 150.0
ATTEMPT_SECONDS = 10.0
POLICY = RetryPolicy(
    max_attempts=4, wait=wait_incrementing(start=10, increment=10), window_seconds=72
)
"""Retries after 10, 20 and 30 s. Nothing is planned to the second, so real time is noise."""

MOMENT = 2.0**-10
"""About a millisecond; sums of these are exact."""


class New(NamedTuple):
    """
    A state to deliver; its value is its version.
    """

    key: str
    version: int
    priority: int


class Row(NamedTuple):
    """
    A live event.
    """

    id: int
    key: str
    version: int
    priority: int
    created_at: float
    available_at: float
    attempts: int = 0
    token: UUID | None = None
    claimed_version: int | None = None
    claimed_by: UUID | None = None
    replaced: int = 0
    first_attempt_at: float | None = None
    code: str | None = None


class Claim(NamedTuple):
    """
    A claimed event, as its worker knows it.
    """

    id: int
    key: str
    version: int
    priority: int
    created_at: float
    attempts: int
    elapsed_seconds: float
    token: UUID
    code: str | None


class Landed(NamedTuple):
    """
    A claimed event and what its attempt led to.
    """

    claim: Claim
    outcome: Outcome


class Ended(NamedTuple):
    """
    A line of the history.
    """

    event_id: int
    key: str
    version: int
    outcome: Ending
    attempts: int
    code: str | None
    created_at: float
    settled_at: float


class Gate(NamedTuple):
    """
    The gate's row.
    """

    closed_until: float
    reason: GateReason
    trips: int = 0
    probe: UUID | None = None


class Taken(NamedTuple):
    """
    What a relay got: nothing to probe means that the gate is half-open and no event is due.
    """

    claims: Sequence[Claim] = ()
    probe: UUID | None = None
    nothing_to_probe: bool = False


class Written(NamedTuple):
    """
    An attempt that was still its worker's, and how its version ended, if it did.
    """

    landed: Landed
    ending: Ending | None


class Settled(NamedTuple):
    """
    What became of a batch of attempts.
    """

    written: Sequence[Written]
    lost: Sequence[Landed]


class Outbox:
    """
    The outbox of one organisation for one destination.

    Attributes:
        rows: the live events, by key.
        history: what ended, the oldest first, less what was pruned.
        endings: how many ever ended.
        doubts: until when a request about (key, version) may take effect.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: dict[str, Row] = {}
        self.history: list[Ended] = []
        self.endings = 0
        self.doubts: dict[tuple[str, int], float] = {}
        self.gate: Gate | None = None
        self._ids = 0
        self._tokens = 0

    def pass_time(self, seconds: float) -> None:
        """
        Let time pass.
        """
        self.now += seconds

    def _begin(self) -> None:
        self.now += MOMENT

    def _token(self) -> UUID:
        self._tokens += 1
        return UUID(int=self._tokens)

    # ----------------------------------------------------------------------- enqueue

    def enqueue(self, states: Iterable[New]) -> None:
        """
        Make these the states to deliver.
        """
        self._begin()
        newest: dict[str, New] = {}
        for new in states:
            if new.key not in newest or newest[new.key].version < new.version:
                newest[new.key] = new
        for number, key in enumerate(sorted(newest)):
            new = newest[key]
            # Rows of one statement share now(), but not the clock.
            created_at = self.now + number * MOMENT / 64
            row = self.rows.get(key)
            if row is None:
                self._ids += 1
                self.rows[key] = Row(
                    self._ids, key, new.version, new.priority, created_at, self.now
                )
            elif self.replaces(new, row):
                self.rows[key] = self.replaced(row, new, created_at)

    def replaces(self, new: New, row: Row) -> bool:
        """
        Only a newer version takes the place of another.
        """
        return row.version < new.version

    def replaced(self, row: Row, new: New, created_at: float) -> Row:
        """
        An event in flight keeps its lease and its count.
        """
        row = row._replace(
            version=new.version,
            priority=new.priority,
            created_at=created_at,
            replaced=row.replaced + 1,
        )
        if row.token is not None:
            return row
        return row._replace(available_at=self.now, attempts=0, first_attempt_at=None, code=None)

    # ------------------------------------------------------------------------- claim

    def take(self, worker_id: UUID, limit: int, *, idle: bool) -> Taken:
        """
        Claim what the gate lets through, in one transaction.

        Args:
            idle: the worker has no flights, so it may probe.
        """
        self._begin()
        match self.gate_state():
            case "open":
                return Taken(self.claim(worker_id, limit, probing=False))
            case "half-open" if idle:
                return self._probe(worker_id)
            case _:
                return Taken()

    def _probe(self, worker_id: UUID) -> Taken:
        if not self.due():
            return Taken(nothing_to_probe=True)
        assert self.gate is not None
        probe = self._token()
        self.gate = self.gate._replace(closed_until=self.now + 2 * ATTEMPT_SECONDS, probe=probe)
        return Taken(self.claim(worker_id, 1, probing=True), probe)

    def due(self) -> list[Row]:
        """
        The events that may be claimed.
        """
        return [row for row in self.rows.values() if row.available_at <= self.now]

    def order(self, row: Row) -> tuple[float, ...]:
        """
        Urgent and old ones first.
        """
        return (row.priority, row.available_at, row.id)

    def probing_order(self, row: Row) -> tuple[float, ...]:
        """
        Probes take turns.
        """
        return (row.available_at, row.id)

    def claim(self, worker_id: UUID, limit: int, *, probing: bool) -> list[Claim]:
        """
        Take up to `limit` due events.
        """
        due = self.due()
        due.sort(key=self.probing_order if probing else self.order)
        claims = [self._claim(row, worker_id) for row in due[:limit]]
        claims.sort(key=lambda claim: (claim.priority, claim.created_at, claim.id))
        return claims

    def _claim(self, row: Row, worker_id: UUID) -> Claim:
        abandoned = row.token is not None
        held_back = not abandoned and self.held_back(row)
        first_attempt_at = row.first_attempt_at
        if first_attempt_at is None or held_back or abandoned or self.overdue(row):
            first_attempt_at = self.now
        if row.claimed_version is not None:
            self.doubt_abandoned(row.key, row.claimed_version)
        token = self._token()
        claimed = row._replace(
            token=token,
            claimed_version=row.version,
            claimed_by=worker_id,
            available_at=self.now + LEASE_SECONDS,
            attempts=self.attempts_at_claim(row, held_back=held_back),
            first_attempt_at=first_attempt_at,
        )
        self.rows[row.key] = claimed
        return Claim(
            id=row.id,
            key=row.key,
            version=row.version,
            priority=row.priority,
            created_at=row.created_at,
            attempts=claimed.attempts,
            elapsed_seconds=self.now - first_attempt_at,
            token=token,
            code=row.code,
        )

    def held_back(self, row: Row) -> bool:
        """
        The gate closed since the first attempt: an outage burns no attempts.
        """
        return (
            self.gate is not None
            and row.first_attempt_at is not None
            and row.first_attempt_at < self.gate.closed_until
        )

    def overdue(self, row: Row) -> bool:
        """
        Nobody came in time: an interrupted series gets a new window.
        """
        return row.available_at < self.now - POLICY.slack_seconds

    def attempts_at_claim(self, row: Row, *, held_back: bool) -> int:
        """
        The attempt is counted before it is made; what befell an older version counts not.
        """
        newer = row.claimed_version is not None and row.claimed_version < row.version
        return 1 if held_back or newer else row.attempts + 1

    def doubt_abandoned(self, key: str, version: int) -> None:
        """
        Whoever held an abandoned claim may have sent its version.
        """
        self.doubt(key, version)

    def doubt(self, key: str, version: int) -> None:
        """
        A request about this version may yet take effect.
        """
        self.doubts[key, version] = self.now + DOUBT_SECONDS

    # ------------------------------------------------------------------------ settle

    def settle(self, landed: Iterable[Landed]) -> Settled:
        """
        Write what became of these attempts, each only if its claim still holds.
        """
        self._begin()
        written: list[Written] = []
        lost: list[Landed] = []
        for one in sorted(landed, key=lambda one: one.claim.id):
            row = self.rows.get(one.claim.key)
            if row is not None and self.holds(row, one.claim):
                written.append(Written(one, self._settle(row, one)))
            else:
                lost.append(one)
        return Settled(written, lost)

    def holds(self, row: Row, claim: Claim) -> bool:
        """
        Every write is guarded by the token.
        """
        return row.id == claim.id and row.token == claim.token

    def _settle(self, row: Row, landed: Landed) -> Ending | None:
        claim, outcome = landed
        moved_on = self.moved_on(row, claim)
        ending = self.ending(outcome, moved_on=moved_on)
        again_at = None
        if isinstance(outcome, Delivered) and not moved_on:
            again_at = self.assert_again_at(row, claim)
        if getattr(outcome, "doubtful", False):
            self.doubt_unanswered(claim)
        if ending is not None:
            self.log(claim, ending, outcome)
        if ending is None or moved_on or again_at is not None:
            self.rows[row.key] = self.released(
                row, outcome, ending=ending, moved_on=moved_on, again_at=again_at
            )
        else:
            del self.rows[row.key]
        return ending

    def moved_on(self, row: Row, claim: Claim) -> bool:
        """
        A newer version came during the flight.
        """
        return row.version > claim.version

    def ending(self, outcome: Outcome, *, moved_on: bool) -> Ending | None:
        """
        How the attempted version ended, if it did.
        """
        match outcome:
            case Delivered():
                return "delivered"
            case Skipped():
                return "skipped"
            case _ if moved_on:
                return "superseded"
            case Dead():
                return "dead"
            case _:
                return None

    def assert_again_at(self, row: Row, claim: Claim) -> float | None:
        """
        When a slow request of an older version cannot arrive any more, if there was one when
        this one was sent: between the first attempt and now, that is.
        """
        since = row.first_attempt_at
        assert since is not None
        return max(
            (
                until
                for (key, version), until in self.doubts.items()
                if key == claim.key and version < claim.version and until > since
            ),
            default=None,
        )

    def doubt_unanswered(self, claim: Claim) -> None:
        """
        The answer never came.
        """
        self.doubt(claim.key, claim.version)

    def log(self, claim: Claim, ending: Ending, outcome: Outcome) -> None:
        """
        Write the history.
        """
        code = outcome.reason if isinstance(outcome, Skipped) else getattr(outcome, "code", None)
        self.history.append(
            Ended(
                event_id=claim.id,
                key=claim.key,
                version=claim.version,
                outcome=ending,
                attempts=claim.attempts,
                code=code,
                created_at=claim.created_at,
                settled_at=self.now,
            )
        )
        self.endings += 1

    def released(
        self,
        row: Row,
        outcome: Outcome,
        *,
        ending: Ending | None,
        moved_on: bool,
        again_at: float | None,
    ) -> Row:
        """
        The event waits again.
        """
        available_at, attempts, first, code = self.now, 0, None, None
        if again_at is not None:
            available_at = again_at
        elif not moved_on and isinstance(outcome, Retry | Deferred):
            available_at = self.now + outcome.after_seconds
        if ending is None:
            attempts, first = row.attempts, row.first_attempt_at
            code = getattr(outcome, "code", None)
            if isinstance(outcome, Deferred):
                attempts -= 1
                first = first if attempts else None
        return row._replace(
            token=None,
            claimed_version=None,
            claimed_by=None,
            available_at=available_at,
            attempts=attempts,
            first_attempt_at=first,
            code=code,
        )

    # -------------------------------------------------------------------------- gate

    def gate_state(self) -> GateState:
        """
        How the gate stands.
        """
        if self.gate is None:
            return "open"
        if self.gate.closed_until > self.now:
            return "closed"
        return "half-open" if self.gate.trips else "open"

    def close(self, closings: Collection[Closing]) -> list[bool]:
        """
        Close the gate for these reasons; for each, whether it closed or prolonged.
        """
        self._begin()
        return [self._close(closing) for closing in closings]

    def _close(self, closing: Closing) -> bool:
        gate, backoff = self.gate, closing.backoff
        trips = 0 if closing.reason == "throttled" else 1
        if gate is None:
            until = self.now + backoff.first_seconds
            self.gate = Gate(until, closing.reason, trips)
            return True
        own = closing.probe is not None and gate.probe == closing.probe
        if not (own or self.may_close(gate, closing.reason)):
            return False
        doubled = backoff.first_seconds * 2 ** min(gate.trips * trips, 20)
        until = self.now + min(backoff.longest_seconds, doubled)
        before = self.now if own else gate.closed_until
        self.gate = Gate(max(before, until), closing.reason, gate.trips + trips)
        return True

    def may_close(self, gate: Gate, reason: GateReason) -> bool:
        """
        A person's word stands, and one outage seen by many is one closing.
        """
        throttled = reason == "throttled" and gate.reason != "operator"
        return gate.closed_until <= self.now or throttled

    def close_by_hand(self) -> None:
        """
        Close the gate until somebody opens it.
        """
        self._begin()
        self.gate = Gate(math.inf, "operator")

    def open_after_probe(self, probe: UUID) -> bool:
        """
        Open the gate, unless somebody closed it meanwhile.
        """
        self._begin()
        if self.gate is None or self.gate.probe != probe:
            return False
        self._open(self.gate)
        return True

    def open_again(self, reasons: Sequence[GateReason] = ALL_REASONS) -> bool:
        """
        Open the gate if it is not open, for one of these reasons.
        """
        self._begin()
        if self.gate is None or self.gate_state() == "open" or self.gate.reason not in reasons:
            return False
        self._open(self.gate)
        return True

    def _open(self, gate: Gate) -> None:
        self.gate = gate._replace(closed_until=self.now, trips=0, probe=None)

    # ------------------------------------------------------------------------- prune

    def prune(self, outcomes: Collection[Ending]) -> int:
        """
        Forget the history of these outcomes, and doubts that are past; how many went.
        """
        self._begin()
        before = len(self.history) + len(self.doubts)
        self.history = [ended for ended in self.history if ended.outcome not in outcomes]
        long_ago = self.now - KEEP_DOUBTS_SECONDS
        self.doubts = {what: until for what, until in self.doubts.items() if until >= long_ago}
        return before - len(self.history) - len(self.doubts)


def state_of(outbox: Outbox) -> dict[str, Any]:
    """
    Everything there is, for comparisons.
    """
    return {
        "rows": dict(outbox.rows),
        "history": list(outbox.history),
        "doubts": dict(outbox.doubts),
        "gate": outbox.gate,
    }

"""
The watch: looks at an outbox after each transaction, and knows what must never be.

It trusts nothing but what it saw itself: the states before and after, what the workers were
given, and what they sent. Names are those of the project's list: S for safety, L for liveness.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from tests.chaos.model import LEASE_SECONDS, POLICY, Claim, Gate, Landed, New, Row, Settled, Taken

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from tests.chaos.model import Outbox

Work = Literal["enqueue", "claim", "settle", "other"]
Place = Literal["waiting", "in flight"] | None

LEGAL: dict[Work, set[tuple[Place, Place]]] = {
    "enqueue": {(None, "waiting"), ("waiting", "waiting"), ("in flight", "in flight")},
    "claim": {("waiting", "in flight"), ("in flight", "in flight")},
    "settle": {("in flight", "waiting"), ("in flight", None)},
    "other": set(),
}
"""Which changes of an event's place each kind of transaction may make."""


class ViolationError(Exception):
    """
    An invariant does not hold.

    Attributes:
        invariant: its name.
        what: what was seen.
        seed: of the schedule, if it has one.
        steps: of the schedule, up to the one that violated.
    """

    def __init__(
        self,
        invariant: str,
        what: str,
        *,
        seed: int | None = None,
        steps: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        super().__init__(invariant, what)
        self.invariant = invariant
        self.what = what
        self.seed = seed
        self.steps = steps

    @override
    def __str__(self) -> str:
        lines = [f"{self.invariant}: {self.what}"]
        if self.seed is not None:
            lines += [f"schedule {self.seed}, after {len(self.steps)} steps:"]
            lines += [f"  {number}. {as_call(step)}" for number, step in enumerate(self.steps, 1)]
            lines += [f"again: python -m tests.chaos.schedules model --seed {self.seed} --count 1"]
        return "\n".join(lines)


def as_call(step: tuple[Any, ...]) -> str:
    """
    A step, as it would be called.
    """
    name, *arguments = step
    return f"{name}({', '.join(map(repr, arguments))})"


class Watch:
    """
    Sees to one outbox.

    Attributes:
        paused: an operator has closed the gate.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._rows: dict[str, Row] = {}
        self._gate: Gate | None = None
        self._newest: dict[str, int] = {}
        self._ended: dict[str, tuple[int, str]] = {}
        self._endings = 0
        self._leases: dict[str, tuple[UUID, float]] = {}
        self._unsettled: dict[tuple[str, int], int] = {}
        self._claims: dict[UUID, int] = {}
        self._probes: set[UUID] = set()
        self.paused = False

    # ------------------------------------------------------------ after a transaction

    def enqueued(self, states: Iterable[New]) -> None:
        """
        These were enqueued.
        """
        for new in states:
            self._newest[new.key] = max(new.version, self._newest.get(new.key, 0))
        self.look("enqueue")

    def took(self, taken: Taken, *, limit: int) -> None:
        """
        A worker claimed.
        """
        if taken.claims:
            self._gate_let_through(taken, limit)
        if taken.probe is None:
            self._hiding_came_first(taken.claims)
        for claim in taken.claims:
            self._claimed(claim)
        self.look("claim")

    def called(self, claim: Claim) -> None:
        """
        A request is sent.
        """
        if claim.attempts > POLICY.max_attempts:
            raise ViolationError("S8", f"{claim.key} is attempted {claim.attempts} times")
        if (times := self._claims[claim.token]) > POLICY.max_attempts:
            raise ViolationError("S8", f"{claim.key} is sent by claim {times} in a row")

    def settled(self, landed: Sequence[Landed], settled: Settled) -> None:
        """
        A worker settled.
        """
        written = {one.landed.claim.token for one in settled.written}
        keys = {one.landed.claim.key for one in settled.written}
        for one in landed:
            self._was_guarded(one.claim, written=one.claim.token in written)
            key = one.claim.key
            if key not in keys and self._outbox.rows.get(key) != self._rows.get(key):
                raise ViolationError("S7", f"a stale token changed {key}")
        if self._outbox.endings - self._endings > len(written):
            raise ViolationError("S7", "a stale token wrote into the history")
        self.look("settle")

    def look(self, work: Work) -> None:
        """
        Compare with what was there before.
        """
        rows = self._outbox.rows
        for key, row in rows.items():
            before = self._rows.get(key)
            if row is not before:
                self._moved(work, before, row)
        for key, row in self._rows.items():
            if key not in rows:
                self._is_legal(work, row, None)
        self._read_history(work)
        self._operator_is_heeded()
        for key, version in self._newest.items():
            self._is_not_lost(key, version)
        self._rows = dict(rows)
        self._gate = self._outbox.gate

    # ------------------------------------------------------------------------- claims

    def _gate_let_through(self, taken: Taken, limit: int) -> None:
        gate, claims = self._gate, taken.claims
        if len(claims) > limit:
            raise ViolationError("S10", f"{len(claims)} claims where {limit} were asked for")
        if gate is None or (gate.closed_until <= self._outbox.now and not gate.trips):
            return
        if gate.closed_until > self._outbox.now:
            raise ViolationError("S10", f"{claims[0].key} was claimed through a closed gate")
        if taken.probe is None or taken.probe in self._probes or len(claims) > 1:
            raise ViolationError("S10", f"{claims[0].key} was claimed through a half-open gate")
        self._probes.add(taken.probe)

    def _hiding_came_first(self, claims: Sequence[Claim]) -> None:
        taken = {claim.key for claim in claims}
        last = max((claim.priority for claim in claims), default=0)
        for key, row in self._rows.items():
            if row.priority < last and key not in taken and row.available_at <= self._outbox.now:
                raise ViolationError("S14", f"{key} is urgent and was left behind")
        if any(one.priority > other.priority for one, other in pairwise(claims)):
            raise ViolationError("S14", "urgent events were not claimed first")

    def _claimed(self, claim: Claim) -> None:
        now = self._outbox.now
        lease = self._leases.get(claim.key)
        if lease is not None and lease[1] > now:
            raise ViolationError("S6", f"{claim.key} was claimed while another lease ran")
        self._leases[claim.key] = (claim.token, now + LEASE_SECONDS)
        before = self._rows[claim.key]
        if claim.attempts not in {1, before.attempts + 1}:
            raise ViolationError("S8", f"{claim.key} went to {claim.attempts}: {before}")
        if self._burnt_by_an_outage(before, claim):
            raise ViolationError("S10", f"an outage burnt attempts of {claim.key}: {before}")
        identity = (claim.key, claim.version)
        self._unsettled[identity] = self._unsettled.get(identity, 0) + 1
        self._claims[claim.token] = self._unsettled[identity]

    def _burnt_by_an_outage(self, before: Row, claim: Claim) -> bool:
        """
        Whether attempts still count that were made before the gate closed.
        """
        gate, first = self._outbox.gate, before.first_attempt_at
        return (
            claim.attempts > 1
            and before.token is None
            and gate is not None
            and first is not None
            and first < gate.closed_until
        )

    def _operator_is_heeded(self) -> None:
        gate = self._outbox.gate
        if self.paused and (gate is None or gate.reason != "operator"):
            raise ViolationError("S10", f"an operator closed the gate, but now it is {gate}")

    # ----------------------------------------------------------------------- settling

    def _was_guarded(self, claim: Claim, *, written: bool) -> None:
        row = self._rows.get(claim.key)
        holds = row is not None and row.token == claim.token
        if written and not holds:
            raise ViolationError("S7", f"a stale token settled {claim.key}@{claim.version}")
        if holds and not written:
            raise ViolationError("S3", f"the result for {claim.key}@{claim.version} was dropped")
        if written:
            self._leases.pop(claim.key, None)
            self._unsettled.pop((claim.key, claim.version), None)

    # ------------------------------------------------------------------------- states

    def _moved(self, work: Work, before: Row | None, after: Row) -> None:
        self._is_legal(work, before, after)
        claimed = (after.token, after.claimed_version, after.claimed_by)
        if any(one is None for one in claimed) and any(one is not None for one in claimed):
            raise ViolationError("S23", f"{after.key} is claimed by halves: {claimed}")
        if after.claimed_version is not None and (
            after.claimed_version > after.version
            or after.attempts < 1
            or after.first_attempt_at is None
        ):
            raise ViolationError("S23", f"{after.key} is in flight, but no attempt counts: {after}")
        if before is None:
            return
        if before.id != after.id or after.version < before.version:
            raise ViolationError("S23", f"{after.key} went back: {before} to {after}")
        if (before.version == after.version) is (work == "enqueue"):
            raise ViolationError("S23", f"{work} changed the version: {before} to {after}")
        if (before.token == after.token) is not (work == "enqueue"):
            raise ViolationError("S23", f"{work} changed the claim: {before} to {after}")

    def _is_legal(self, work: Work, before: Row | None, after: Row | None) -> None:
        if (place_of(before), place_of(after)) not in LEGAL[work]:
            raise ViolationError("S23", f"{work} led from {before} to {after}")

    def _read_history(self, work: Work) -> None:
        outbox = self._outbox
        new = outbox.endings - self._endings
        if new and work != "settle":
            raise ViolationError("S23", f"{work} wrote into the history")
        self._endings = outbox.endings
        for ended in outbox.history[len(outbox.history) - new :]:
            if ended.version < self._ended.get(ended.key, (0, ""))[0]:
                raise ViolationError("S23", f"{ended.key}@{ended.version} ended after a newer one")
            self._ended[ended.key] = (ended.version, ended.outcome)

    def _is_not_lost(self, key: str, version: int) -> None:
        row = self._outbox.rows.get(key)
        if row is not None:
            if row.version != version:
                raise ViolationError("S3", f"{key}@{version} was lost to {key}@{row.version}")
        elif self._ended.get(key, (0, ""))[0] != version or self._ended[key][1] == "superseded":
            raise ViolationError("S3", f"{key}@{version} neither lives nor ended")

    # ------------------------------------------------------------------ when it is over

    def converged(self, shown: dict[str, int]) -> None:
        """
        The destination shows the newest version of each key that was delivered.
        """
        for key, version in self._newest.items():
            if self._ended[key][1] == "delivered" and shown.get(key) != version:
                raise ViolationError("S12", f"{key} shows {shown.get(key)} instead of {version}")


def place_of(row: Row | None) -> Place:
    """
    Where an event stands.
    """
    if row is None:
        return None
    return "waiting" if row.token is None else "in flight"

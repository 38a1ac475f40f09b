"""
The world around an outbox: workers, a destination, people, and everything that goes wrong.

Each public method of `World` is one step of a schedule; whoever calls them, with whatever
arguments, a watch looks on. What a worker thinks is the product's own code (`decide`, the
breaker); what the database does is the outbox it is given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID

from outbox.breaker import Breaker
from outbox.destination import Destination
from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from outbox.gate import Backoff
from outbox.outcome import Dead, Deferred, Delivered, Ending, Outcome, Skipped, decide
from tests.chaos.model import (
    ATTEMPT_SECONDS,
    DOUBT_SECONDS,
    LEASE_SECONDS,
    POLICY,
    Claim,
    Landed,
    New,
)
from tests.chaos.schedule_watch import ViolationError, Watch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.event import Event
    from outbox.outcome import Settlement
    from tests.chaos.model import Outbox, Written

KEYS = ("a", "b", "c", "d")
WORKERS = 3
CONCURRENCY = 3
TENS = 10.0
"""Everything takes a multiple of so many seconds."""

HEALING_ROUNDS = 100
"""Within so many looks everything has to end once the faults are over."""

Fate = Literal[
    "delivered",
    "reply lost",  # it took effect, but nobody hears of it
    "no answer",  # it takes effect later
    "swallowed",  # nobody hears of it, and it never takes effect
    "busy",
    "throttled",
    "configuration",
    "gone",
    "skipped",
    "interrupted",  # the worker was told to stop; it takes effect later
]
"""What may become of a request."""

Manner = Literal["in time", "stalled"]
"""How a worker sends."""

ERRORS: dict[Fate, DeliveryError] = {
    "reply lost": TransientError("lost", "The reply was lost.", doubtful=True),
    "no answer": TransientError("timeout", "No answer.", doubtful=True),
    "swallowed": TransientError("timeout", "No answer.", doubtful=True),
    "busy": TransientError("busy", "Busy."),
    "throttled": ThrottledError("throttled", "Wait.", retry_after=20),
    "configuration": ConfigurationError("forbidden", "Forbidden."),
    "gone": PermanentError("gone", "There is no such record."),
}

TAKES_EFFECT: set[Fate] = {"delivered", "reply lost"}
TAKES_EFFECT_LATE: set[Fate] = {"no answer", "interrupted"}


async def _deliver(_event: Event, _seconds: float) -> Delivered:
    raise NotImplementedError


async def _record(_connection: AsyncConnection, _settlements: Sequence[Settlement]) -> None:
    raise NotImplementedError


async def _redrive(_limit: int | None) -> int:
    raise NotImplementedError


DESTINATION = Destination(
    name="xledger",
    organization_id=UUID(int=1),
    deliver=_deliver,
    record=_record,
    redrive=_redrive,
    policy=POLICY,
    concurrency=CONCURRENCY,
    attempt_seconds=ATTEMPT_SECONDS,
    lease_seconds=LEASE_SECONDS,
    doubt_seconds=DOUBT_SECONDS,
    outage=Backoff(first_seconds=10, longest_seconds=40),
    configuration=Backoff(first_seconds=20, longest_seconds=40),
    breaker_keys=2,
)
"""Read by the breaker; what it could call is never called."""


class Flight(NamedTuple):
    """
    A claim whose request has not met its fate.
    """

    claim: Claim
    probe: UUID | None
    claimed_at: float

    @property
    def lease_ends_at(self) -> float:
        """
        When somebody else may claim the event.
        """
        return self.claimed_at + LEASE_SECONDS


class Request(NamedTuple):
    """
    A request that is on its way.
    """

    arrives_at: float
    key: str
    version: int


class Worker:
    """
    A process: all that is lost when it dies.
    """

    def __init__(self, worker_id: UUID) -> None:
        self.id = worker_id
        self.flights: list[Flight] = []
        self.landed: list[Landed] = []
        self.settled: list[Landed] = []
        self.breaker = Breaker(DESTINATION)


class World:
    """
    Workers and people around one outbox.

    Attributes:
        shown: what the destination shows, by key.
        failures: keys whose delivery was given up: version, and whether the cause may pass.
    """

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.watch = Watch(outbox)
        self.shown: dict[str, int] = {}
        self.failures: dict[str, tuple[int, bool]] = {}
        self.versions: dict[str, int] = dict.fromkeys(KEYS, 0)
        self.priorities: dict[str, int] = dict.fromkeys(KEYS, 0)
        self._requests: list[Request] = []
        self._born = 0
        self.workers = [self._worker() for _ in range(WORKERS)]

    def _worker(self) -> Worker:
        self._born += 1
        return Worker(UUID(int=self._born))

    # ------------------------------------------------------------------------- people

    def change_minds(self, wishes: Sequence[tuple[str, int]]) -> None:
        """
        A business transaction: for each key a new version, of this priority.
        """
        self._enqueue([self._next(key, priority) for key, priority in wishes])

    def enqueue_late(self, key: str, back: int) -> None:
        """
        A version that is not new: the newest one again, or older by so many.

        Older than one that has ended it cannot be: versions are drawn in the order of commits.
        """
        version = self.versions[key] - back
        if version > 0 and (not back or key in self.outbox.rows):
            self._enqueue([New(key, version, self.priorities[key])])

    def pause(self) -> None:
        """
        An operator closes the gate.
        """
        self.outbox.close_by_hand()
        self.watch.paused = True
        self.watch.look("other")

    def resume(self) -> None:
        """
        An operator opens the gate.
        """
        self.outbox.open_again()
        self.watch.paused = False
        self.watch.look("other")

    def retry_by_hand(self) -> None:
        """
        A coordinator retries everything that was given up.
        """
        self._redrive(list(self.failures), None)

    def prune(self, outcomes: Collection[Ending]) -> None:
        """
        Old history and past doubts are removed.
        """
        self.outbox.prune(outcomes)
        self.watch.look("other")

    def _next(self, key: str, priority: int) -> New:
        self.versions[key] += 1
        self.priorities[key] = priority
        return New(key, self.versions[key], priority)

    def _enqueue(self, states: Sequence[New]) -> None:
        self.outbox.enqueue(states)
        self.watch.enqueued(states)

    def _redrive(self, keys: Sequence[str], limit: int | None) -> None:
        """
        The current state goes again, unless it is on its way already.
        """
        idle = sorted(key for key in keys if key not in self.outbox.rows)[:limit]
        if idle:
            self._enqueue([self._next(key, self.priorities[key]) for key in idle])

    def _redrive_recoverable(self, limit: int | None) -> None:
        self._redrive([key for key, (_, passes) in self.failures.items() if passes], limit)

    # ---------------------------------------------------------------------------- time

    def wait(self, seconds: float) -> None:
        """
        Time passes, and what is due arrives.
        """
        self.outbox.pass_time(seconds)
        self._arrive(self.outbox.now)

    def _arrive(self, until: float) -> None:
        if self._requests:
            for request in sorted(one for one in self._requests if one.arrives_at <= until):
                self.shown[request.key] = request.version
            self._requests = [one for one in self._requests if one.arrives_at > until]

    # ------------------------------------------------------------------------- workers

    def has_work(self, worker: Worker) -> bool:
        """
        Whether a worker's next transaction could find anything to do.
        """
        breaker = worker.breaker
        mine = worker.landed or breaker.closings or breaker.recovered is not None
        return bool(mine or self.outbox.due())

    def turn(self, number: int, limit: int) -> bool:
        """
        A worker's next transaction; whether there was anything to do.
        """
        worker = self.workers[number]
        if worker.breaker.closings:
            self.outbox.close(list(worker.breaker.closings.values()))
            worker.breaker.reset()
            self.watch.look("other")
        elif worker.landed:
            self._settle(worker)
        elif worker.breaker.recovered is not None:
            self._redrive_recoverable(None)
            self.outbox.open_after_probe(worker.breaker.recovered)
            worker.breaker.reset()
            self.watch.look("other")
        else:
            return self._take(worker, min(limit, CONCURRENCY - len(worker.flights)))
        return True

    def fly(self, number: int, fate: Fate, delay: float, manner: Manner = "in time") -> None:
        """
        A worker's oldest claim meets its fate.

        Args:
            delay: until a late request takes effect.
            manner: whether the worker looks at its lease when it sends, or stood still between.
        """
        worker = self.workers[number]
        if worker.flights:
            flight = worker.flights.pop(0)
            outcome = self._attempt(flight, fate, delay, manner)
            outcome = worker.breaker.judge(flight.claim.key, outcome, probe=flight.probe)
            worker.landed.append(Landed(flight.claim, outcome))

    def all_turn(self, limit: int) -> None:
        """
        The next transaction of each worker who has any.
        """
        for number, worker in enumerate(self.workers):
            if self.has_work(worker):
                self.turn(number, limit)

    def all_fly(self, fate: Fate, delay: float) -> None:
        """
        The same fate for all.
        """
        for number in range(WORKERS):
            self.fly(number, fate, delay)

    def all_work(self, limit: int, fate: Fate, delay: float) -> None:
        """
        Each worker claims, sends and settles.
        """
        self.all_turn(limit)
        self.all_fly(fate, delay)
        self.all_turn(limit)

    def crash(self, number: int, delay: float | None) -> None:
        """
        A worker dies with what it has in its hands, and another one is started.

        Args:
            delay: until its requests take effect; None if none was sent.
        """
        worker = self.workers[number]
        if delay is not None:
            for flight in worker.flights:
                if self._may_send(flight):
                    self._send(flight, delay)
        self.workers[number] = self._worker()

    def settle_again(self, number: int) -> None:
        """
        The answer to a worker's COMMIT was lost, so it settles the same again.
        """
        worker = self.workers[number]
        if worker.settled:
            self._write(worker.settled)

    def _take(self, worker: Worker, limit: int) -> bool:
        if not limit:
            return False
        taken = self.outbox.take(worker.id, limit, idle=not worker.flights)
        self.watch.took(taken, limit=limit)
        if taken.nothing_to_probe:
            self._redrive_recoverable(1)
        now = self.outbox.now
        worker.flights += [Flight(claim, taken.probe, now) for claim in taken.claims]
        return bool(taken.claims)

    def _settle(self, worker: Worker) -> None:
        worker.settled, worker.landed = worker.landed, []
        self._write(worker.settled)

    def _write(self, landed: Sequence[Landed]) -> None:
        settled = self.outbox.settle(landed)
        for written in settled.written:
            self._record(written)
        self.watch.settled(landed, settled)

    def _record(self, written: Written) -> None:
        claim, outcome = written.landed
        if written.ending == "dead":
            assert isinstance(outcome, Dead)
            self.failures[claim.key] = (claim.version, outcome.recoverable)
        elif written.ending == "delivered":
            self.failures.pop(claim.key, None)

    # ------------------------------------------------------------------------ requests

    def _attempt(self, flight: Flight, fate: Fate, delay: float, manner: Manner) -> Outcome:
        claim = flight.claim
        waited = self.outbox.now - flight.claimed_at
        if claim.attempts > POLICY.max_attempts:
            return Dead(code="abandoned", message="", unsent=True)
        if waited > LEASE_SECONDS / 2 and not (manner == "stalled" and self._may_send(flight)):
            return Deferred(after_seconds=0, code="late")
        if fate == "skipped":
            return Skipped(reason="other organisation")
        self.watch.called(claim)
        if fate in TAKES_EFFECT:
            self.shown[claim.key] = claim.version
        elif fate in TAKES_EFFECT_LATE:
            self._send(flight, delay)
        if fate == "delivered":
            return Delivered()
        if fate == "interrupted":
            return Deferred(after_seconds=0, code="interrupted", doubtful=True)
        elapsed = claim.elapsed_seconds + waited
        return decide(ERRORS[fate], attempt=claim.attempts, elapsed_seconds=elapsed, policy=POLICY)

    def _may_send(self, flight: Flight) -> bool:
        """
        A worker that stands still for longer than lease and doubt together is out of scope.
        """
        return self.outbox.now < flight.lease_ends_at + DOUBT_SECONDS

    def _send(self, flight: Flight, delay: float) -> None:
        """
        A request takes effect within the time of a doubt: from when it was sent, or, if its
        worker stood still, from when somebody else may claim the event.
        """
        now, longest = self.outbox.now, DOUBT_SECONDS
        if now > flight.lease_ends_at:
            longest = flight.lease_ends_at + DOUBT_SECONDS - now
        request = Request(now + min(delay, longest), flight.claim.key, flight.claim.version)
        self._requests.append(request)

    # ------------------------------------------------------------------------- healing

    def heal(self) -> None:
        """
        The faults stop; everything has to end, and the destination to show the truth.
        """
        self.resume()
        for number in range(1, WORKERS):
            self._work(number)
        for _ in range(HEALING_ROUNDS):
            self._work(0)
            if not self.outbox.rows and not self.failures:
                break
            self.retry_by_hand()
            self.wait(self._until_something_is_due())
        else:
            raise ViolationError("L1", f"did not end: {self.outbox.rows or self.failures}")
        self._arrive(math.inf)
        self.watch.converged(self.shown)

    def _work(self, number: int) -> None:
        """
        A worker does all there is to do, and all goes well.
        """
        worker = self.workers[number]
        for _ in range(HEALING_ROUNDS):
            while worker.flights:
                self.fly(number, "delivered", 0)
            if not (self.has_work(worker) and self.turn(number, CONCURRENCY)):
                return
        raise ViolationError("L1", f"worker {number} finds no end")

    def _until_something_is_due(self) -> float:
        now, gate = self.outbox.now, self.outbox.gate
        times = [row.available_at for row in self.outbox.rows.values()]
        if gate is not None:
            times.append(gate.closed_until)
        soonest = min((at for at in times if at > now), default=now)
        return max(1, math.ceil((soonest - now) / TENS)) * TENS

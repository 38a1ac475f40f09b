"""
The relay: claim what is due, deliver it, decide, settle; then the same again.

One loop owns the database side of a destination. Attempts run beside it as tasks. Each turn
is one transaction: it settles what has landed and claims for the room that was left, and for
as many as are going to land until the next turn, so that none of the places stands empty.
Batches grow with the load, and with the next wake-up or retry a turn comes at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from uuid import UUID, uuid4

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from structlog.contextvars import bound_contextvars
from tenacity import wait_random_exponential

from outbox import gate, store
from outbox.breaker import Breaker
from outbox.cursor import Cursor
from outbox.flights import Flights
from outbox.gate import OPEN, Gate
from outbox.line import Line, UndoError
from outbox.outcome import Deferred, Retry
from outbox.retry import RetryPolicy
from outbox.store import START, Landed, Settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from outbox.destination import Destination
    from outbox.event import Event
    from outbox.outcome import Settlement
    from outbox.store import Claimed, Position

log = structlog.get_logger(__name__)

DATABASE_PATIENCE = RetryPolicy(wait=wait_random_exponential(multiplier=0.5, max=3))
"""How long to leave a failing database alone: up to 3 s at random, to be back within 5."""

DRAIN_FAILURES = 3
"""So many failures in a row a drain outlasts, some seconds of a failover; a worker, any number."""

HURRY = 2
"""So many stops mean that flights are not waited for."""

BUSY_SECONDS = 0.05
"""How soon to settle again what a business transaction held."""


PATIENCE_SECONDS = 60.0
"""A drain waits for retries that are due within this; what is put off further is the next one's."""


DrainEnd = Literal["done", "time", "gate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """
    Why a drain ended, and what it did.

    Args:
        ended: `done` when nothing was due any more, else what left work behind.
        tally: how many attempts ended how: delivered, superseded, dead, skipped, retry,
            deferred, lost.
    """

    ended: DrainEnd
    tally: Counter[str]


class Relay:
    """
    Delivers the events of one destination, from this process.

    Args:
        poll_seconds: between looks at the database when nothing else wakes the relay, unless
            the destination has its own.
        database_seconds: no transaction takes longer; a black hole would otherwise hold us.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        destination: Destination,
        *,
        poll_seconds: float = 1.0,
        database_seconds: float = 10.0,
    ) -> None:
        self.worker_id = uuid4()
        self.gate: Gate = OPEN
        self.tally: Counter[str] = Counter()
        self._line = Line(engine, seconds=database_seconds)
        self._destination = destination
        self._poll_seconds = destination.poll_seconds or poll_seconds
        self._observer = destination.observer
        self._breaker = Breaker(destination)
        self._where: gate.Where = {
            "destination": destination.name,
            "organization_id": destination.organization_id,
        }
        self._awake = asyncio.Event()
        self._flights = Flights(destination, call=self._awake.set)
        self._unsettled: list[Landed] = []
        self._due: list[float] = []  # monotonic seconds at which what we put off is due
        self._cursor = Cursor()
        self._stops = 0

    # ------------------------------------------------------------------ from outside

    def wake(self) -> None:
        """
        There may be something to claim: look now instead of at the next poll.
        """
        self._awake.set()

    def stop(self) -> None:
        """
        Claim nothing more and let flights land; called twice, do not wait for them.
        """
        self._stops += 1
        self._flights.grounded = True
        self._observer.stopping()
        self._awake.set()

    async def run(self, *, grace_seconds: float) -> None:
        """
        Deliver until `stop` is called; survive any time without a database.

        Args:
            grace_seconds: how long flights may take to land after `stop`. The others are
                given back without burning an attempt.
        """
        async with self._at_work():
            while not self._stops:
                if not await self._turn_in_the_end():
                    await self._rest()
            await self._land(grace_seconds)

    async def drain(self, *, seconds: float | None = None) -> Drained:
        """
        Deliver until nothing is due, the gate closes, or the time is over.

        Retries that this drain scheduled are waited for, if they are due within a minute. When
        the time is over nothing more is claimed and flights land, which takes one attempt's
        time at most.

        Raises:
            SQLAlchemyError, TimeoutError, OSError: the database failed again and again; what was
            claimed comes back by itself.
        """
        ends_at = None if seconds is None else time.monotonic() + seconds
        async with self._at_work():
            while (ended := await self._drained(ends_at)) is None:
                pass
            self._flights.grounded = True  # whoever waits for a place gives up
            await self._land(self._destination.attempt_seconds)
        return Drained(ended=ended, tally=self.tally)

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """
        Whatever is logged meanwhile says by whom; afterwards the database is let go.
        """
        try:
            with bound_contextvars(
                worker_id=str(self.worker_id),
                destination=self._destination.name,
                organization_id=str(self._destination.organization_id),
            ):
                yield
        finally:
            await self._line.aclose()

    async def _drained(self, ends_at: float | None) -> DrainEnd | None:
        """
        One turn of a drain; why it ended, or None if it goes on.
        """
        if self._stops or (ends_at is not None and time.monotonic() >= ends_at):
            return "time"
        more = await self._turn_in_the_end(failures_at_most=DRAIN_FAILURES, ends_at=ends_at)
        if not more and not self._flights and not self._unsettled:
            if self.gate.state == "closed":
                return "gate"
            soon = time.monotonic() + PATIENCE_SECONDS
            if not any(due <= soon for due in self._due):
                return "done"
        if not more:
            await self._rest(ends_at)
        return None

    # ---------------------------------------------------------------------- the loop

    async def _turn_in_the_end(
        self, *, failures_at_most: int | None = None, ends_at: float | None = None
    ) -> bool:
        """
        A turn, tried again as long as the database fails. True: look again at once.

        Args:
            failures_at_most: in a row; then, or if no new try will mend it, it raises.
            ends_at: monotonic seconds at which it is not tried again.

        Raises:
            SQLAlchemyError, TimeoutError, OSError: the database failed more often than that.
        """
        failures = 0
        while True:
            try:
                more = await self._turn()
            except (SQLAlchemyError, TimeoutError, OSError) as error:
                failures += 1
                enough = failures_at_most is not None and failures > failures_at_most
                if enough or (failures_at_most is not None and not _database_failed(error)):
                    raise
                await self._leave_database_alone(failures, error, ends_at)
                if self._stops or (ends_at is not None and time.monotonic() >= ends_at):
                    return True
                continue
            if failures:
                log.info("outbox.database_back", failures=failures)
            return more

    async def _turn(self) -> bool:
        """
        Settle what landed and claim for the room it left. True: look again at once.
        """
        await self._collect()
        if self._breaker.recovered is not None:
            await self._settle_landed()
            await self._recover(self._breaker.recovered)
        now = time.monotonic()
        self._due = [due for due in self._due if due > now]
        if self._stops:
            await self._settle_landed()
            return False
        return await self._settle_and_claim()

    async def _rest(self, ends_at: float | None = None) -> None:
        """
        Until a flight lands, somebody wakes us, a retry is due, or the poll.
        """
        now = time.monotonic()
        # Ten per cent of jitter keeps many workers from polling in step.
        until = now + self._poll_seconds * random.uniform(0.9, 1.1)  # noqa: S311 (no secret)
        until = min([until, *self._due])
        if self._unsettled:
            until = min(until, now + BUSY_SECONDS)
        if ends_at is not None:
            until = min(until, ends_at)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - now)):
                await self._awake.wait()
        self._awake.clear()

    async def _leave_database_alone(
        self, failures: int, error: Exception, no_later_than: float | None
    ) -> None:
        seconds = DATABASE_PATIENCE.delay_after(failures)
        log.warning(
            "outbox.database_failed",
            error=type(error).__name__,
            failures=failures,
            again_in_seconds=round(seconds, 1),
        )
        ends_at = time.monotonic() + seconds
        if no_later_than is not None:
            ends_at = min(ends_at, no_later_than)
        while not self._stops and (left := ends_at - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._awake.wait()
            self._awake.clear()

    # ------------------------------------------------------------------------- claim

    async def _settle_and_claim(self) -> bool:
        """
        Both in one transaction: half the round trips, and one wait for the disk.
        """
        landed, room = list(self._unsettled), self._flights.room
        if not landed and room <= 0:
            return False
        claimed_at = time.monotonic()
        again = False
        events: Sequence[Event] = ()
        try:
            # A claim alone is one statement, and needs no BEGIN and COMMIT around it.
            line = self._line.transaction() if landed else self._line.statements()
            async with line as connection:
                settled = await self._settle(connection, landed)
                if (room := room - len(settled.busy)) > 0:
                    events, again = await self._claim(connection, room)
        except Exception as error:
            if not landed or _database_failed(error):
                raise
            await self._flush(landed)
            return True
        self._observer.turned(seconds=time.monotonic() - claimed_at, claimed=len(events))
        self._settled(landed, settled)
        self._take_off_all(events, claimed_at=claimed_at)
        # Flights from before the gate closed are no probes; let them land first.
        if self.gate.state == "half-open" and not self._flights and not self._unsettled:
            return await self._probe()
        return again and not self._unsettled

    async def _claim(self, connection: AsyncConnection, room: int) -> tuple[Sequence[Event], bool]:
        """
        What the gate lets through now, and whether there may be more at once.
        """
        claimed = await self._claim_up_to(connection, room, after=self._cursor.begin())
        again = self._cursor.move(claimed, wanted=room)
        is_open = claimed.gate == "open"
        self.gate = OPEN if is_open else await gate.look(connection, **self._where)
        self._flights.grounded = self._stops > 0 or self.gate.state != "open"
        return claimed.events, again

    async def _probe(self) -> bool:
        """
        Send one event through a half-open gate, if nobody else does. True: look again at once.
        """
        claimed_at = time.monotonic()
        seconds = 2 * self._destination.attempt_seconds
        async with self._line.transaction() as connection:
            probe = await gate.probe(connection, **self._where, seconds=seconds)
            if probe is None:
                self.gate = replace(self.gate, state="closed")
                return False
            claimed = await self._claim_up_to(connection, 1, probing=True)
            if not claimed.events:
                raise UndoError
        if not claimed.events:
            return claimed.is_overtaken or bool(await self._redrive(1))
        events = claimed.events
        self._observer.turned(seconds=time.monotonic() - claimed_at, claimed=len(events))
        self._take_off_all(events, claimed_at=claimed_at, probe=probe)
        return False

    async def _claim_up_to(
        self,
        connection: AsyncConnection,
        limit: int,
        *,
        after: Position = START,
        probing: bool = False,
    ) -> Claimed:
        return await store.claim(
            connection,
            destination=self._destination.name,
            organization_id=self._destination.organization_id,
            worker_id=self.worker_id,
            limit=limit,
            lease_seconds=self._destination.lease_seconds,
            slack_seconds=self._destination.policy.slack_seconds,
            doubt_seconds=self._destination.doubt_seconds,
            look_up=self._destination.look_up,
            after=after,
            probing=probing,
        )

    def _take_off_all(
        self, events: Sequence[Event], *, claimed_at: float, probe: UUID | None = None
    ) -> None:
        for event in events:
            self._take_off(event, claimed_at=claimed_at, probe=probe)

    def _take_off(self, event: Event, *, claimed_at: float, probe: UUID | None) -> None:
        self._flights.take_off(event, claimed_at=claimed_at, probe=probe)

    # ------------------------------------------------------------------------ settle

    async def _settle_landed(self) -> None:
        await self._collect()
        if self._unsettled:
            await self._flush(self._unsettled)

    async def _collect(self) -> None:
        for flight in self._flights.collect():
            # In the light of the destination's health.
            outcome = self._breaker.judge(flight.event.key, flight.outcome, probe=flight.probe)
            self._unsettled.append(Landed(event=flight.event, outcome=outcome))
        # First, so that no process claims in between what is about to be released.
        if self._breaker.closings:
            await self._close_gate()

    async def _close_gate(self) -> None:
        async with self._line.transaction() as connection:
            for closing in self._breaker.closings.values():
                closed = await gate.close(
                    connection,
                    **self._where,
                    reason=closing.reason,
                    message=closing.message,
                    closed_by=str(self.worker_id),
                    backoff=closing.backoff,
                    probe=closing.probe,
                )
                if closed:
                    log.warning(
                        "outbox.gate_closed", reason=closing.reason, message=closing.message
                    )
        self._breaker.reset()

    async def _flush(self, landed: Sequence[Landed]) -> None:
        """
        Settle all together; if that fails for one's own fault, each by itself.
        """
        began = time.monotonic()
        try:
            async with self._line.transaction() as connection:
                settled = await self._settle(connection, landed)
        except Exception as error:
            if _database_failed(error):
                raise
            if len(landed) > 1:
                for one in landed:
                    await self._flush([one])
                return
            # The claim runs out and the event comes back: it stays, and is heard of again.
            log.exception("outbox.settle_failed", **self._destination.about(landed[0].event))
            settled = Settled()
        else:
            self._observer.turned(seconds=time.monotonic() - began, claimed=0)
        self._settled(landed, settled)

    async def _settle(self, connection: AsyncConnection, landed: Sequence[Landed]) -> Settled:
        if not landed:
            return Settled()
        settled = await store.settle(
            connection, landed, doubt_seconds=self._destination.doubt_seconds
        )
        await self._destination.record(connection, settled.written)
        return settled

    def _settled(self, landed: Sequence[Landed], settled: Settled) -> None:
        done = {one.token for one in landed} - {one.token for one in settled.busy}
        self._unsettled = [one for one in self._unsettled if one.token not in done]
        for one in settled.lost:
            log.warning("outbox.claim_lost", **self._destination.about(one.event))
        self.tally["lost"] += len(settled.lost)
        if settled.lost:
            self._observer.lost(len(settled.lost))
        self.tally.update(
            settlement.ending or type(settlement.outcome).__name__.lower()
            for settlement in settled.written
        )
        # Counted from here, because the database counted from when it wrote.
        now = time.monotonic()
        self._due += [now + seconds for seconds in map(_put_off, settled.written) if seconds]
        if settled.written:
            self._observer.settled(settled.written)

    async def _recover(self, probe: UUID) -> None:
        """
        A probe came through: what died of the outage goes again, then the gate opens.

        In this order, because a process that dies in between leaves the gate half-open,
        and the next probe finishes the work.
        """
        redriven = await self._redrive(None)
        if redriven is None:
            self._breaker.reset()  # the probe's time passes, and the next one tries again
            return
        async with self._line.transaction() as connection:
            opened = await gate.open_after_probe(connection, **self._where, probe=probe)
        self._breaker.reset()
        if opened:
            log.info("outbox.gate_opened", redriven=redriven)

    async def _redrive(self, limit: int | None) -> int | None:
        """
        How many keys were enqueued again; None if the application could not do it.
        """
        await self._line.aclose()  # it takes one from the pool, too
        try:
            redriven = await self._destination.redrive(limit)
        except (SQLAlchemyError, TimeoutError, OSError):
            raise
        except Exception:
            log.exception("outbox.redrive_failed")
            return None
        self._observer.redriven(redriven)
        return redriven

    # -------------------------------------------------------------------------- land

    async def _land(self, grace_seconds: float) -> None:
        """
        Let flights land, then give the rest back; settle as long as the database lets us.
        """
        ends_at = time.monotonic() + grace_seconds
        while self._flights and self._stops < HURRY and time.monotonic() < ends_at:
            await self._settle_quietly()
            if self._flights:
                await self._rest(ends_at)
        for flight in await self._flights.cancel():
            log.error("outbox.flight_left", **self._destination.about(flight.event))
        while self._flights or self._unsettled:
            if not await self._settle_quietly() or time.monotonic() > ends_at:
                break
            if self._unsettled:
                await self._rest(ends_at + BUSY_SECONDS)
        for one in self._unsettled:
            log.warning("outbox.claim_left", **self._destination.about(one.event))

    async def _settle_quietly(self) -> bool:
        try:
            await self._settle_landed()
        except (SQLAlchemyError, TimeoutError, OSError) as error:
            log.warning("outbox.database_failed", error=type(error).__name__)
            return False
        return True


def _database_failed(error: Exception) -> bool:
    """
    Whether it is the database's fault; else one of the events may be to blame.
    """
    kinds = (OperationalError, InterfaceError, TimeoutError, OSError)
    return isinstance(error, kinds) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _put_off(settlement: Settlement) -> float | None:
    """
    Seconds until this event goes again by itself; None if it ended, or waits for a gate.
    """
    match settlement.outcome:
        case Retry() | Deferred(closes=None) if settlement.ending is None:
            return settlement.outcome.after_seconds
        case _:
            return None

"""
A mirror: an outbox in a real database and its model, told the same and compared each time.

Whatever is done to the mirror is done to both. What both answer must be the same, and so must
be every row afterwards. Times may differ by the real time that a schedule takes.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import UUID

import psycopg
from typing_extensions import override

from outbox import NewEvent, gate, store
from outbox.gate import ALL_REASONS
from tests.chaos.model import (
    ATTEMPT_SECONDS,
    DOUBT_SECONDS,
    LEASE_SECONDS,
    POLICY,
    Claim,
    Landed,
    New,
    Outbox,
    Settled,
    Taken,
)
from worker import database

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox import Event
    from outbox.breaker import Closing
    from outbox.outcome import Ending, GateReason

Answer = TypeVar("Answer")

WHERE: gate.Where = {"destination": "xledger", "organization_id": UUID(int=1)}

FORGET = """
    WITH events AS (DELETE FROM outbox.events), settled AS (DELETE FROM outbox.settled),
         doubts AS (DELETE FROM outbox.doubts)
    DELETE FROM outbox.gates
"""

AGE = """
    WITH span AS MATERIALIZED (SELECT make_interval(secs => %s) AS length),
    events AS (
        UPDATE outbox.events
           SET created_at = created_at - length, available_at = available_at - length,
               first_attempt_at = first_attempt_at - length
          FROM span),
    settled AS (
        UPDATE outbox.settled
           SET created_at = created_at - length, settled_at = settled_at - length
          FROM span),
    doubts AS (UPDATE outbox.doubts SET until = until - length FROM span)
    UPDATE outbox.gates SET closed_until = closed_until - length FROM span
"""

_EVERYTHING = """
    SELECT ARRAY(SELECT jsonb_build_array(
                     id, key, version, priority, {created_at}, {available_at}, attempts,
                     claim_token, claimed_version, claimed_by, replaced, {first_attempt_at},
                     last_error_code, payload -> 'value')
                   FROM outbox.events ORDER BY id),
           ARRAY(SELECT jsonb_build_array(
                     event_id, key, version, outcome, attempts, error_code, {created_at},
                     {settled_at}, payload -> 'value')
                   FROM outbox.settled ORDER BY id),
           ARRAY(SELECT jsonb_build_array(key, version, {until})
                   FROM outbox.doubts ORDER BY key, version),
           ARRAY(SELECT jsonb_build_array(
                     CASE WHEN isfinite(closed_until) THEN {closed_until} END,
                     reason, trips, probe)
                   FROM outbox.gates)
"""

TIMES = ("created_at", "available_at", "first_attempt_at", "settled_at", "until", "closed_until")

EVERYTHING = _EVERYTHING.format(
    **{one: f"CAST(round(extract(epoch FROM {one} - now()) / 10) AS int)" for one in TIMES}
)
"""All rows, with times as tens of seconds from now: real time is too short to be seen."""


class DifferenceError(Exception):
    """
    The database did not do what the model did.
    """


class Database:
    """
    A migrated database: what is tested goes through the worker's engine, the rest beside it.

    Args:
        url: without the name of a driver.
    """

    def __init__(self, url: str) -> None:
        url += f"{'&' if '?' in url else '?'}options=-c%20synchronous_commit%3Doff"
        self.beside = psycopg.connect(url, autocommit=True)
        self._runner = asyncio.Runner()
        self._engine = database.connect(url, application_name="schedules", pool_size=2)
        self.single = self.run(self._connected("AUTOCOMMIT"))
        self.transaction = self.run(self._connected("READ COMMITTED"))

    async def _connected(self, level: Literal["AUTOCOMMIT", "READ COMMITTED"]) -> AsyncConnection:
        connection = await self._engine.connect()
        return await connection.execution_options(isolation_level=level)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """
        Wait for the worker's engine.
        """
        return self._runner.run(work)

    def close(self) -> None:
        """
        Give the connections back.
        """
        for connection in (self.single, self.transaction):
            self.run(connection.close())
        self.run(self._engine.dispose())
        self._runner.close()
        self.beside.close()

    def forget(self) -> None:
        """
        Begin anew, without rows.
        """
        self.beside.execute(FORGET)

    def pass_time(self, seconds: float) -> None:
        """
        Let time pass, as far as the database can tell.
        """
        self.beside.execute(AGE, [seconds])

    def everything(self) -> tuple[Any, ...]:
        """
        Events, history, doubts and gate.
        """
        row = self.beside.execute(EVERYTHING, prepare=True).fetchone()
        assert row is not None
        return row

    def vacuum(self) -> None:
        """
        Without it, thousands of schedules would leave more dead rows than live ones.
        """
        self.beside.execute("VACUUM outbox.events, outbox.settled, outbox.doubts, outbox.gates")


@contextmanager
def connected(url: str) -> Iterator[Database]:
    """
    A database, closed at the end.
    """
    opened = Database(url)
    try:
        yield opened
    finally:
        opened.close()


class Mirror(Outbox):
    """
    The outbox in a database, beside its model.
    """

    def __init__(self, opened: Database) -> None:
        super().__init__()
        self._database = opened
        self._events: dict[UUID, Event] = {}
        self._probes: dict[UUID, UUID] = {}
        self._passed = 0.0
        self._passed_then: dict[UUID, float] = {}
        self._real_ids: dict[int, int] = {}
        opened.forget()

    # --------------------------------------------------------------- told the same

    @override
    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        self._passed += seconds
        self._database.pass_time(seconds)
        self._compare()

    @override
    def enqueue(self, states: Iterable[New]) -> None:
        states = list(states)
        super().enqueue(states)
        events = [
            NewEvent(
                **WHERE,
                key=new.key,
                version=new.version,
                payload={"value": new.version},
                priority=new.priority,
            )
            for new in states
        ]
        self._database.run(store.enqueue(self._database.single, events))
        self._compare()

    @override
    def take(self, worker_id: UUID, limit: int, *, idle: bool) -> Taken:
        taken = super().take(worker_id, limit, idle=idle)
        events, probe = self._database.run(self._take(worker_id, limit, idle=idle))
        self._same(
            "claims",
            [(claim.key, claim.version, claim.priority) for claim in taken.claims],
            [(event.key, event.version, event.priority) for event in events],
        )
        self._same("probe", taken.probe is not None, probe is not None)
        for claim, event in zip(taken.claims, events, strict=True):
            self._learn(claim, event)
        if taken.probe and probe:
            self._probes[taken.probe] = probe
        self._compare()
        return taken

    async def _take(
        self, worker_id: UUID, limit: int, *, idle: bool
    ) -> tuple[list[Event], UUID | None]:
        """
        What a relay does in the transaction of a claim.
        """
        connection = self._database.transaction
        async with connection.begin() as work:
            claimed = await self._claim_really(worker_id, limit, probing=False)
            if claimed.gate == "open":
                return claimed.events, None
            if claimed.events:
                raise AssertionError("Something was claimed through a gate that is not open.")
            if claimed.gate == "closed" or not idle:
                return [], None
            probe = await gate.probe(connection, **WHERE, seconds=2 * ATTEMPT_SECONDS)
            claimed = await self._claim_really(worker_id, 1, probing=True)
            if not claimed.events:
                await work.rollback()
                return [], None
            return claimed.events, probe

    async def _claim_really(self, worker_id: UUID, limit: int, *, probing: bool) -> store.Claimed:
        return await store.claim(
            self._database.transaction,
            **WHERE,
            worker_id=worker_id,
            limit=limit,
            lease_seconds=LEASE_SECONDS,
            slack_seconds=POLICY.slack_seconds,
            doubt_seconds=DOUBT_SECONDS,
            probing=probing,
        )

    def _learn(self, claim: Claim, event: Event) -> None:
        self._events[claim.token] = event
        self._passed_then[claim.token] = self._passed
        self._same(
            "claim",
            (claim.attempts, round(claim.elapsed_seconds / 10), claim.code),
            (event.attempts, round(event.elapsed_seconds / 10), event.last_error_code),
        )

    def _aged(self, claim: Claim) -> Event:
        """
        An event in a worker's hands: time passes for it too.
        """
        event = self._events[claim.token]
        age = timedelta(seconds=self._passed - self._passed_then[claim.token])
        return replace(event, created_at=event.created_at - age)

    @override
    def settle(self, landed: Iterable[Landed]) -> Settled:
        landed = list(landed)
        settled = super().settle(landed)
        really = self._database.run(
            store.settle(
                self._database.single,
                [store.Landed(event=self._aged(one.claim), outcome=one.outcome) for one in landed],
                doubt_seconds=DOUBT_SECONDS,
            )
        )
        written = [(one.landed.claim.id, one.ending) for one in settled.written]
        ids = {self._real_ids[event_id]: ending for event_id, ending in written}
        self._same("written", ids, {one.event_id: one.ending for one in really.written})
        lost = {self._events[one.claim.token].claim_token for one in settled.lost}
        self._same("lost", lost, {one.token for one in really.lost})
        self._same("busy", [], really.busy)
        self._compare()
        return settled

    @override
    def close(self, closings: Collection[Closing]) -> list[bool]:
        closed = super().close(closings)
        self._same("closed", closed, self._database.run(self._close_really(closings)))
        self._compare()
        return closed

    async def _close_really(self, closings: Collection[Closing]) -> list[bool]:
        connection = self._database.transaction
        async with connection.begin():
            return [
                await gate.close(
                    connection,
                    **WHERE,
                    reason=closing.reason,
                    message=closing.message,
                    closed_by="a relay",
                    backoff=closing.backoff,
                    probe=closing.probe and self._probes[closing.probe],
                )
                for closing in closings
            ]

    @override
    def close_by_hand(self) -> None:
        super().close_by_hand()
        self._database.run(
            gate.close_by_hand(self._database.single, **WHERE, message="", closed_by="an operator")
        )
        self._compare()

    @override
    def open_after_probe(self, probe: UUID) -> bool:
        opened = super().open_after_probe(probe)
        connection, token = self._database.single, self._probes[probe]
        really = self._database.run(gate.open_after_probe(connection, **WHERE, probe=token))
        self._same("opened", opened, really)
        self._compare()
        return opened

    @override
    def open_again(self, reasons: Sequence[GateReason] = ALL_REASONS) -> bool:
        opened = super().open_again(reasons)
        connection = self._database.single
        really = self._database.run(gate.open_again(connection, **WHERE, reasons=reasons))
        self._same("opened", opened, really)
        self._compare()
        return opened

    @override
    def prune(self, outcomes: Collection[Ending]) -> int:
        gone = super().prune(outcomes)
        really = self._database.run(
            store.prune(self._database.single, keep_days=dict.fromkeys(outcomes, 0))
        )
        self._same("pruned", gone, really)
        self._compare()
        return gone

    # -------------------------------------------------------------------- compared

    def _compare(self) -> None:
        """
        Everything in the database must be as in the model.
        """
        events, history, doubts, gates = self._database.everything()
        self._learn_ids({key: event_id for event_id, key, *_ in events})
        self._same("events", self._events_expected(), events)
        self._same("history", self._history_expected(), history)
        self._same("doubts", self._doubts_expected(), doubts)
        self._same("gate", self._gates_expected(), gates)

    def _learn_ids(self, ids: dict[str, int]) -> None:
        for row in self.rows.values():
            if row.key in ids:
                self._real_ids.setdefault(row.id, ids[row.key])

    def _events_expected(self) -> list[list[object]]:
        return [
            [
                self._real_ids.get(row.id),
                row.key,
                row.version,
                row.priority,
                self._tens(row.created_at),
                self._tens(row.available_at),
                row.attempts,
                row.token and str(self._events[row.token].claim_token),
                row.claimed_version,
                row.claimed_by and str(row.claimed_by),
                row.replaced,
                self._tens(row.first_attempt_at),
                row.code,
                row.version,
            ]
            for row in sorted(self.rows.values(), key=lambda row: row.id)
        ]

    def _history_expected(self) -> list[list[object]]:
        return [
            [
                self._real_ids[ended.event_id],
                ended.key,
                ended.version,
                ended.outcome,
                ended.attempts,
                ended.code,
                self._tens(ended.created_at),
                self._tens(ended.settled_at),
                ended.version,
            ]
            for ended in self.history
        ]

    def _doubts_expected(self) -> list[list[object]]:
        return [
            [key, version, self._tens(until)]
            for (key, version), until in sorted(self.doubts.items())
        ]

    def _gates_expected(self) -> list[list[object]]:
        if self.gate is None:
            return []
        until, reason, trips, probe = self.gate
        return [[self._tens(until), reason, trips, probe and str(self._probes[probe])]]

    def _tens(self, at: float | None) -> int | None:
        return None if at is None or math.isinf(at) else round((at - self.now) / 10)

    def _same(self, what: str, model: object, found: object) -> None:
        if model != found:
            raise DifferenceError(f"{what}:\n  model    {model}\n  database {found}")

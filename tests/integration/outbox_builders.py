"""
An outbox in a real database, and a pretend destination that answers as it is told.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import text
from tenacity import wait_exponential

from outbox import Delivered, Destination, Event, NewEvent, Relay, RetryPolicy, enqueue, gate, store
from outbox.destination import DOUBT_SECONDS
from outbox.store import Claimed, Landed
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from outbox import Settlement, Skipped
    from outbox.gate import Gate
    from outbox.outcome import Outcome
    from outbox.store import Settled

DESTINATION = "xledger"
"""Invented, so that nothing here can rely on the portal."""

FAST = RetryPolicy(wait=wait_exponential(multiplier=0.01))
"""Four attempts like the real one, 10, 20 and 40 ms apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """
    One request that reached the pretend destination.
    """

    key: str
    version: int
    value: Any
    attempts: int


class Hold:
    """
    A request that hangs at the destination until it is let go.
    """

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.let_go = asyncio.Event()


class Remote:
    """
    A pretend destination: takes what it is told, unless an answer was ordered.

    Attributes:
        calls: every request, in the order of arrival.
        values: what it would show, by key.
        broken: while set, every request fails with this.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.values: dict[str, Any] = {}
        self.broken: BaseException | None = None
        self._answers: dict[str, deque[BaseException | Hold | Skipped]] = defaultdict(deque)

    def answers(self, key: str, *answers: BaseException | Hold | Skipped) -> None:
        """
        Order answers for the next requests about a key; after them, it succeeds.
        """
        self._answers[key].extend(answers)

    def holds(self, key: str) -> Hold:
        """
        Let the next request about a key hang.
        """
        hold = Hold()
        self.answers(key, hold)
        return hold

    def about(self) -> list[str]:
        """
        Whom the requests were about, in order.
        """
        return [call.key for call in self.calls]

    async def deliver(self, event: Event, _seconds: float) -> Delivered | Skipped:
        """
        The handler of the destination.
        """
        value = event.payload["value"]
        self.calls.append(
            Call(key=event.key, version=event.version, value=value, attempts=event.attempts)
        )
        answer = self._answers[event.key].popleft() if self._answers[event.key] else self.broken
        if isinstance(answer, Hold):
            answer.arrived.set()
            await answer.let_go.wait()
        elif isinstance(answer, BaseException):
            raise answer
        elif answer is not None:
            return answer
        self.values[event.key] = value
        return Delivered()


class Outbox:
    """
    The events of one organisation for one destination, in a real database.

    Attributes:
        recorded: what the application was told to record, committed or not.
        redriven: how often, and with which limit, a re-drive was asked for.
        redrive: what the re-drive does; nothing, unless a test says otherwise.
        record: called for each batch of settlements; may raise.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.organization_id = uuid4()
        self.recorded: list[Settlement] = []
        self.redriven: list[int | None] = []
        self.redrive: Callable[[int | None], Awaitable[int]] | None = None
        self.record: Callable[[Settlement], None] = lambda _: None

    # ------------------------------------------------------------------------- store

    def new(self, key: str = "a", version: int = 1, **changes: Any) -> NewEvent:  # noqa: ANN401
        """
        A state to deliver; its value is its version, unless said otherwise.
        """
        value = changes.pop("value", version)
        return NewEvent(
            **{
                "destination": DESTINATION,
                "key": key,
                "organization_id": self.organization_id,
                "version": version,
                "payload": {"value": value},
                **changes,
            }
        )

    async def enqueue(self, key: str = "a", version: int = 1, **changes: Any) -> None:  # noqa: ANN401
        """
        Enqueue one state and commit.
        """
        async with self.engine.begin() as connection:
            await enqueue(connection, [self.new(key, version, **changes)])

    async def claim(self, limit: int = 10, **changes: Any) -> list[Event]:  # noqa: ANN401
        """
        Claim and commit.
        """
        async with self.engine.begin() as connection:
            return await self.claim_on(connection, limit, **changes)

    async def claim_on(
        self,
        connection: AsyncConnection,
        limit: int = 10,
        **changes: Any,  # noqa: ANN401
    ) -> list[Event]:
        """
        Claim in the transaction of a connection.
        """
        return (await self.claim_really(connection, limit, **changes)).events

    async def claim_really(
        self,
        connection: AsyncConnection,
        limit: int = 10,
        **changes: Any,  # noqa: ANN401
    ) -> Claimed:
        """
        Claim in the transaction of a connection, and tell what was found beside events.
        """
        return await store.claim(
            connection,
            **{
                "destination": DESTINATION,
                "organization_id": self.organization_id,
                "worker_id": uuid4(),
                "limit": limit,
                "lease_seconds": 60,
                "slack_seconds": 1,
                "doubt_seconds": DOUBT_SECONDS,
                **changes,
            },
        )

    async def settle(self, event: Event, outcome: Outcome) -> Settled:
        """
        Settle one attempt and commit.
        """
        return await self.settle_all([Landed(event=event, outcome=outcome)])

    async def settle_all(self, landed: Sequence[Landed]) -> Settled:
        """
        Settle attempts together and commit.
        """
        async with self.engine.begin() as connection:
            return await store.settle(connection, landed, doubt_seconds=DOUBT_SECONDS)

    # -------------------------------------------------------------------------- look

    async def execute(self, statement: str, **parameters: object) -> None:
        """
        Run one statement and commit.
        """
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), parameters)

    async def rows(self, query: str, **parameters: object) -> Sequence[Row[Any]]:
        """
        The rows of a query.
        """
        async with self.engine.connect() as connection:
            return (await connection.execute(text(query), parameters)).all()

    async def waits_for_an_advisory_lock(self) -> bool:
        """
        Whether a session of this database does.
        """
        query = """
        SELECT 1 FROM pg_locks
         WHERE locktype = 'advisory' AND NOT granted
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """
        return bool(await self.rows(query))

    async def live(self, key: str = "a") -> Row[Any] | None:
        """
        The live event of a key, with how many seconds it has to wait.
        """
        rows = await self.rows(
            "SELECT *, CAST(extract(epoch FROM available_at - now()) AS float) AS waits"
            " FROM outbox.events WHERE destination = :destination AND key = :key",
            destination=DESTINATION,
            key=key,
        )
        return rows[0] if rows else None

    async def waiting(self, key: str = "a") -> Row[Any]:
        """
        The live event of a key, which must exist.
        """
        row = await self.live(key)
        assert row is not None
        return row

    async def history(self, key: str = "a") -> list[tuple[int, str]]:
        """
        How the versions of a key ended: (version, outcome), oldest first.
        """
        rows = await self.rows(
            "SELECT version, outcome FROM outbox.settled WHERE key = :key ORDER BY id", key=key
        )
        return [(row.version, row.outcome) for row in rows]

    async def doubts(self, key: str = "a") -> list[int]:
        """
        The versions of a key whose requests may yet take effect.
        """
        rows = await self.rows(
            "SELECT version FROM outbox.doubts WHERE key = :key AND until > now() ORDER BY version",
            key=key,
        )
        return [row.version for row in rows]

    async def pass_time(self, seconds: float) -> None:
        """
        Let time pass, as far as the database can tell.
        """
        for table, columns in {
            "events": ("created_at", "available_at", "first_attempt_at"),
            "gates": ("closed_until",),
            "doubts": ("until",),
            "settled": ("created_at", "settled_at"),
        }.items():
            moved = ", ".join(f"{one} = {one} - make_interval(secs => :seconds)" for one in columns)
            await self.execute(f"UPDATE outbox.{table} SET {moved}", seconds=seconds)  # noqa: S608

    # -------------------------------------------------------------------------- gate

    @property
    def where(self) -> gate.Where:
        """
        Which gate is ours.
        """
        return {"destination": DESTINATION, "organization_id": self.organization_id}

    async def gate(self) -> Gate:
        """
        How the gate stands.
        """
        async with self.engine.connect() as connection:
            return await gate.look(connection, **self.where)

    async def close_gate(
        self,
        reason: Any = "outage",  # noqa: ANN401 (one of the automatic reasons)
        *,
        seconds: float = 60,
        longest_seconds: float | None = None,
        probe: UUID | None = None,
    ) -> bool:
        """
        Close the gate as a relay would.
        """
        async with self.engine.begin() as connection:
            return await gate.close(
                connection,
                **self.where,
                reason=reason,
                message=f"closed for {reason}",
                closed_by="a relay",
                backoff=gate.Backoff(
                    first_seconds=seconds, longest_seconds=longest_seconds or seconds
                ),
                probe=probe,
            )

    async def probe(self, *, seconds: float = 10) -> UUID | None:
        """
        Ask for the probe of a half-open gate.
        """
        async with self.engine.begin() as connection:
            return await gate.probe(connection, **self.where, seconds=seconds)

    async def close_gate_by_hand(self) -> None:
        """
        Close the gate as an operator would.
        """
        async with self.engine.begin() as connection:
            await gate.close_by_hand(
                connection, **self.where, message="maintenance", closed_by="an operator"
            )

    async def open_gate(self, *reasons: Any) -> bool:  # noqa: ANN401 (gate reasons)
        """
        Open the gate, whatever closed it unless reasons are given.
        """
        async with self.engine.begin() as connection:
            return await gate.open_again(
                connection, **self.where, reasons=reasons or gate.ALL_REASONS
            )

    async def half_open_gate(self) -> None:
        """
        A gate that closed by itself some time ago and waits for a probe.
        """
        await self.close_gate("outage", seconds=1)
        await self.pass_time(2)

    # ------------------------------------------------------------------------- relay

    def destination(
        self,
        deliver: Callable[[Event, float], Awaitable[Delivered | Skipped]],
        **changes: Any,  # noqa: ANN401
    ) -> Destination:
        """
        The destination of a relay, with fast retries unless said otherwise.
        """
        return Destination(
            **{
                "name": DESTINATION,
                "organization_id": self.organization_id,
                "deliver": deliver,
                "record": self._record,
                "redrive": self._redrive,
                "policy": FAST,
                **changes,
            }
        )

    def relay(
        self,
        deliver: Callable[[Event, float], Awaitable[Delivered | Skipped]],
        *,
        engine: AsyncEngine | None = None,
        database_seconds: float = 10.0,
        **changes: Any,  # noqa: ANN401
    ) -> Relay:
        """
        A relay that looks often.
        """
        return Relay(
            engine or self.engine,
            self.destination(deliver, **changes),
            poll_seconds=0.02,
            database_seconds=database_seconds,
        )

    async def _record(self, _: AsyncConnection, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            self.record(settlement)
        self.recorded.extend(settlements)

    async def _redrive(self, limit: int | None) -> int:
        self.redriven.append(limit)
        return await self.redrive(limit) if self.redrive else 0


async def run_to_the_end(outbox: Outbox, relay: Relay) -> None:
    """
    Let a relay run until no event is alive.
    """

    async def over() -> bool:
        return not await outbox.rows("SELECT 1 FROM outbox.events")

    async with running(relay):
        await until(over)


@asynccontextmanager
async def running(*relays: Relay, grace_seconds: float = 5.0) -> AsyncIterator[None]:
    """
    Let relays run meanwhile, and stop them; an error of theirs fails the test.
    """
    async with asyncio.TaskGroup() as group:
        for relay in relays:
            group.create_task(relay.run(grace_seconds=grace_seconds))
        try:
            yield
        finally:
            for relay in relays:
                relay.stop()

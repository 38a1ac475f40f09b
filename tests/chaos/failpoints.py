"""
Named places at which a process of ours can be made to die, or to stand still.

    claim COMMIT ─ after-claim ─ before-send ─ bytes-sent ─ after-reply
                 ─ before-settle ─ inside-settle ─ after-settle          (worker, drain)
    before-commit ─ after-commit                                         (a transition)

The product has no hook for them: `install` wraps its seams from outside, in the processes
of the harness alone. A point is armed for one mentor, and goes off once in all processes
together: whoever makes the file in `fired` first.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from aiohttp.client_reqrep import ClientRequest
from sqlalchemy import event as sqlalchemy_event
from tenacity import wait_exponential

from outbox import Relay, RetryPolicy, store
from outbox.gate import Backoff
from worker import portal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from outbox import Delivered, Destination, Event, Settlement, Skipped

WorkerPoint = Literal[
    "after-claim",
    "before-send",
    "bytes-sent",
    "after-reply",
    "before-settle",
    "inside-settle",
    "after-settle",
]
TransitionPoint = Literal["before-commit", "after-commit"]
Point = WorkerPoint | TransitionPoint

WORKER_POINTS: Sequence[WorkerPoint] = get_args(WorkerPoint)
TRANSITION_POINTS: Sequence[TransitionPoint] = get_args(TransitionPoint)

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arming:
    """
    Where a mentor's event, or transition, is fatal, and how often.

    Args:
        times: so many processes meet it.
    """

    point: Point
    action: Literal["kill", "stop"] = "kill"
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """
    An arming that went off.

    Args:
        at: monotonic seconds, the same clock in all processes of a machine.
    """

    key: str
    point: Point
    action: str
    pid: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """
    How much faster than in life things go, where seconds would be wasted.

    Args:
        doubt_seconds: how long a request without answer may still take effect.
        policy_factor: multiplies the waits of the retry policy.
        gate_factor: multiplies how long a gate stays closed.
        database_seconds: no transaction of a relay takes longer.
    """

    doubt_seconds: float = 4.0
    policy_factor: float = 0.1
    gate_factor: float = 0.1
    database_seconds: float = 10.0


class Failpoints:
    """
    The armed points of one process.

    Args:
        armed: by mentor.
        fired: a folder that all processes share.
    """

    def __init__(self, armed: Mapping[str, Arming], fired: Path) -> None:
        self._armed = armed
        self._fired = fired
        self.current: ContextVar[str] = ContextVar("current", default="")

    def hit(self, point: Point, key: str | None = None) -> None:
        """
        Go off here, if this is the place.
        """
        key = key or self.current.get()
        arming = self._armed.get(key)
        if arming is None or arming.point != point:
            return
        for turn in range(arming.times):
            if self._first(key, arming, turn):
                os.kill(os.getpid(), SIGNALS[arming.action])
                return

    def _first(self, key: str, arming: Arming, turn: int) -> bool:
        note = Fired(
            key=key, point=arming.point, action=arming.action, pid=os.getpid(), at=time.monotonic()
        )
        draft = self._fired / f".{os.getpid()}"
        draft.write_text(json.dumps(asdict(note)))
        try:
            # A link appears whole and only once, whoever reads the folder meanwhile.
            os.link(draft, self._fired / f"{key}.{turn}")
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True


def read_fired(folder: Path) -> list[Fired]:
    """
    What has gone off so far.
    """
    notes = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return [Fired(**json.loads(path.read_text())) for path in notes]


def install(points: Failpoints, scale: Scale) -> None:
    """
    Wrap the seams of this process: `Relay`, the portal's destination, the writing of requests.
    """
    _wrap_relay(points, scale)
    _wrap_destination(points, scale)
    _wrap_writing(points)


def watch_commits(engine: AsyncEngine, points: Failpoints) -> None:
    """
    Let the transitions of this engine pass `before-commit`.
    """
    sqlalchemy_event.listen(
        engine.sync_engine, "commit", lambda _connection: points.hit("before-commit")
    )


def _wrap_relay(points: Failpoints, scale: Scale) -> None:
    take_off, note_settled, settle = Relay._take_off, Relay._settled, store.settle
    begin = Relay.__init__

    def noting_init(self: Relay, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (as the original)
        begin(self, *args, **{"database_seconds": scale.database_seconds} | kwargs)

    def noting_take_off(self: Relay, event: Event, **how: Any) -> None:  # noqa: ANN401
        points.hit("after-claim", event.key)
        take_off(self, event, **how)

    async def noting_settle(
        connection: AsyncConnection,
        landed: Sequence[store.Landed],
        **how: Any,  # noqa: ANN401
    ) -> store.Settled:
        for one in landed:
            points.hit("before-settle", one.event.key)
        return await settle(connection, landed, **how)

    def noting_settled(self: Relay, landed: Sequence[store.Landed], settled: store.Settled) -> None:
        for one in settled.written:
            points.hit("after-settle", one.key)
        note_settled(self, landed, settled)

    Relay.__init__ = noting_init  # type: ignore[method-assign]
    Relay._take_off = noting_take_off  # type: ignore[method-assign]
    Relay._settled = noting_settled  # type: ignore[method-assign]
    store.settle = noting_settle


def _wrap_destination(points: Failpoints, scale: Scale) -> None:
    make = portal.destination

    def made(*args: Any, **kwargs: Any) -> Destination:  # noqa: ANN401 (as the original)
        plain = make(*args, **kwargs)
        return replace(
            plain,
            deliver=_noting_deliver(points, plain.deliver),
            record=_noting_record(points, plain.record),
            policy=RetryPolicy(
                max_attempts=plain.policy.max_attempts,
                wait=wait_exponential(multiplier=scale.policy_factor),
                window_seconds=plain.policy.window_seconds,
            ),
            doubt_seconds=scale.doubt_seconds,
            outage=_scaled(plain.outage, scale.gate_factor),
            configuration=_scaled(plain.configuration, scale.gate_factor),
        )

    portal.destination = made


def _scaled(backoff: Backoff, factor: float) -> Backoff:
    return Backoff(
        first_seconds=backoff.first_seconds * factor,
        longest_seconds=backoff.longest_seconds * factor,
    )


def _noting_deliver(
    points: Failpoints, deliver: Callable[[Event, float], Awaitable[Delivered | Skipped]]
) -> Callable[[Event, float], Awaitable[Delivered | Skipped]]:
    async def noting(event: Event, seconds: float) -> Delivered | Skipped:
        points.current.set(event.key)  # of this attempt's task alone
        points.hit("before-send")
        try:
            return await deliver(event, seconds)
        finally:
            points.hit("after-reply")

    return noting


def _noting_record(
    points: Failpoints,
    record: Callable[[AsyncConnection, Sequence[Settlement]], Awaitable[None]],
) -> Callable[[AsyncConnection, Sequence[Settlement]], Awaitable[None]]:
    async def noting(connection: AsyncConnection, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            points.hit("inside-settle", one.key)
        await record(connection, settlements)

    return noting


def _wrap_writing(points: Failpoints) -> None:
    write = ClientRequest.write_bytes

    async def noting(self: ClientRequest, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        await write(self, *args, **kwargs)
        points.hit("bytes-sent")

    ClientRequest.write_bytes = noting  # type: ignore[method-assign]

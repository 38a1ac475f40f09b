"""
One attempt: a claimed event, its deadline, its handler, and what came of it.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from outbox.errors import TransientError
from outbox.outcome import Dead, Deferred, Outcome, decide

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

    from outbox.destination import Destination
    from outbox.event import Event

    UnderWay = tuple[Event, Destination] | None

log = structlog.get_logger(__name__)

_under_way: ContextVar[UnderWay] = ContextVar("attempt", default=None)


def about_the_attempt(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
    """
    A processor of structlog's: which event a line is about that is logged in an attempt.

    It is asked for when something is logged, so attempts of which nothing is cost nothing.
    """
    under_way = _under_way.get()
    if under_way is None:
        return fields
    event, destination = under_way
    return destination.about(event) | dict(fields)


async def attempt(event: Event, destination: Destination, *, claimed_at: float) -> Outcome:
    """
    Deliver once, within the deadline; only a cancellation gets out of here.

    Whatever is logged meanwhile says which event it is about: see `about_the_attempt`.

    Args:
        claimed_at: monotonic seconds, from before the claim was asked for.
    """
    token = _under_way.set((event, destination))
    try:
        return await _attempted(event, destination, claimed_at)
    finally:
        _under_way.reset(token)


async def _attempted(event: Event, destination: Destination, claimed_at: float) -> Outcome:
    if event.attempts > destination.policy.max_attempts:
        return Dead(code="abandoned", message="Every attempt ended with its worker.", unsent=True)
    if time.monotonic() - claimed_at > destination.lease_seconds / 2:
        # This process stood still; the claim may be somebody else's before we are done.
        return Deferred(after_seconds=0, code="late")
    began = time.monotonic()
    outcome = await _delivered(event, destination, claimed_at)
    destination.observer.attempted(outcome, seconds=time.monotonic() - began)
    return outcome


async def _delivered(event: Event, destination: Destination, claimed_at: float) -> Outcome:
    seconds = min(
        destination.attempt_seconds,
        destination.policy.remaining_seconds(event.elapsed_seconds),
    )
    error: BaseException
    try:
        async with asyncio.timeout(seconds):
            return await destination.deliver(event, seconds)
    except (DBAPIError, PoolTimeout) as raised:
        if _is_away(raised):
            # Our own database, which the handler asked for something; not the event's fault.
            return Deferred(after_seconds=1, code="database")
        error = raised
    except TimeoutError:
        error = TransientError("timeout", f"No answer within {seconds:.1f} s.", doubtful=True)
    except asyncio.CancelledError as cancellation:
        if _told_to_stop():
            raise
        error = cancellation  # of something that the handler waited for
    except Exception as raised:  # noqa: BLE001 (no error of a handler may lose an event)
        error = raised
    return _decided(event, error, destination, claimed_at)


def _is_away(error: DBAPIError | PoolTimeout) -> bool:
    """
    Whether the database could not be asked; a pooler calls its loss an internal error.
    """
    kinds = (OperationalError, InterfaceError, PoolTimeout)
    return isinstance(error, kinds) or error.connection_invalidated


def _told_to_stop() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _decided(
    event: Event, error: BaseException, destination: Destination, claimed_at: float
) -> Outcome:
    outcome = decide(
        error,
        attempt=event.attempts,
        elapsed_seconds=event.elapsed_seconds + time.monotonic() - claimed_at,
        policy=destination.policy,
    )
    log.info(
        "outbox.attempt_failed",
        outcome=type(outcome).__name__.lower(),
        code=getattr(outcome, "code", None),
    )
    return outcome

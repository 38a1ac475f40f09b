"""
One attempt: a claimed event, its deadline, its handler, and what came of it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError

from outbox.errors import TransientError
from outbox.outcome import Dead, Deferred, Outcome, decide

if TYPE_CHECKING:
    from outbox.destination import Destination
    from outbox.event import Event

log = structlog.get_logger(__name__)


async def attempt(event: Event, destination: Destination, *, claimed_at: float) -> Outcome:
    """
    Deliver once, within the deadline; only a cancellation gets out of here.

    Args:
        claimed_at: monotonic seconds, from before the claim was asked for.
    """
    if event.attempts > destination.policy.max_attempts:
        return Dead(code="abandoned", message="Every attempt ended with its worker.")
    if time.monotonic() - claimed_at > destination.lease_seconds / 2:
        # This process stood still; the claim may be somebody else's before we are done.
        return Deferred(after_seconds=0, code="late")
    seconds = min(
        destination.attempt_seconds,
        destination.policy.remaining_seconds(event.elapsed_seconds),
    )
    if seconds <= 0:
        return Dead(
            code=event.last_error_code or "window_over",
            message="The time for retries was over.",
            recoverable=True,
        )
    try:
        async with asyncio.timeout(seconds):
            return await destination.deliver(event, seconds)
    except (OperationalError, InterfaceError):
        # Our own database, which the handler asked for something; not the event's fault.
        return Deferred(after_seconds=1, code="database")
    except TimeoutError:
        error: Exception = TransientError(
            "timeout", f"No answer within {seconds:.1f} s.", doubtful=True
        )
    except Exception as raised:  # noqa: BLE001 (no error of a handler may lose an event)
        error = raised
    return _decided(event, error, destination, claimed_at)


def _decided(
    event: Event, error: Exception, destination: Destination, claimed_at: float
) -> Outcome:
    outcome = decide(
        error,
        attempt=event.attempts,
        elapsed_seconds=event.elapsed_seconds + time.monotonic() - claimed_at,
        policy=destination.policy,
    )
    log.info(
        "outbox.attempt_failed",
        destination=event.destination,
        key=event.key,
        version=event.version,
        attempt=event.attempts,
        outcome=type(outcome).__name__.lower(),
        code=getattr(outcome, "code", None),
    )
    return outcome

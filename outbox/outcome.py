"""
What is to become of an attempt: decided here, written elsewhere.

    Delivered              the destination confirmed
    Skipped(reason)        there was nothing to send; no failure
    Retry(after)           once more, by the policy
    Deferred(after, …)     not this event's fault: nothing is burnt, the gate may close
    Dead(code, message)    given up; only a person, a newer state or a recovery helps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)

if TYPE_CHECKING:
    from uuid import UUID

    from outbox.retry import RetryPolicy

AutomaticReason = Literal["throttled", "outage", "configuration"]
"""Why a gate closes by itself."""

GateReason = AutomaticReason | Literal["operator"]
"""Why a gate is closed."""

THROTTLED_SECONDS = 30.0
"""How long to keep away when the destination says "wait" but not for how long."""

SHORTEST_THROTTLED_SECONDS = 1.0
"""And when it names no time at all, or one that is past: never as fast as we can."""

LONGEST_THROTTLED_SECONDS = 86_400.0
"""Whatever number a handler passes on, a day later it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """
    The destination confirmed this version.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """
    There was nothing to send, for a reason that is no failure.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """
    Try again `after_seconds` from now; the attempt counts.
    """

    after_seconds: float
    code: str
    doubtful: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """
    Try again later; the attempt does not count.

    Args:
        after_seconds: until this event may go again.
        closes: the gate to close for everybody meanwhile, or None.
    """

    after_seconds: float
    code: str
    closes: AutomaticReason | None = None
    message: str = ""
    doubtful: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """
    Given up.

    Args:
        recoverable: the cause may pass by itself, so a recovery re-drives the key.
        unsent: given up without a request, so it says nothing about the destination.
    """

    code: str
    message: str
    recoverable: bool = False
    doubtful: bool = False
    unsent: bool = False


Outcome = Delivered | Skipped | Retry | Deferred | Dead

Ending = Literal["delivered", "superseded", "dead", "skipped"]
"""How a version of a key ends in the history, `outbox.settled`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """
    What became of one attempt, as written in this transaction.

    Args:
        version, payload: what was attempted, not what came during the flight.
        ending: how that version ended, or None if it will be tried again.
        retries: attempts after the first.
    """

    event_id: int
    destination: str
    key: str
    organization_id: UUID
    version: int
    payload: dict[str, Any]
    outcome: Outcome
    ending: Ending | None
    retries: int


def decide(
    error: BaseException, *, attempt: int, elapsed_seconds: float, policy: RetryPolicy
) -> Outcome:
    """
    What an error means for an event.

    Args:
        attempt: the one that failed, counted from 1.
        elapsed_seconds: from the start of the first attempt to the end of this one.
    """
    match error:
        case ThrottledError():
            asked = THROTTLED_SECONDS if error.retry_after is None else error.retry_after
            return Deferred(
                after_seconds=min(
                    LONGEST_THROTTLED_SECONDS, max(SHORTEST_THROTTLED_SECONDS, asked)
                ),
                code=error.code,
                closes="throttled",
                message=error.message,
                doubtful=error.doubtful,
            )
        case ConfigurationError():
            return Deferred(
                after_seconds=0,
                code=error.code,
                closes="configuration",
                message=error.message,
                doubtful=error.doubtful,
            )
        case PermanentError():
            return Dead(
                code=error.code,
                message=error.message,
                doubtful=error.doubtful,
                unsent=error.unsent,
            )
        case DeliveryError():
            return _again(error, attempt, elapsed_seconds, policy)
        case _:
            return _again(_from_a_bug(error), attempt, elapsed_seconds, policy)


def _again(
    error: DeliveryError, attempt: int, elapsed_seconds: float, policy: RetryPolicy
) -> Retry | Dead:
    delay = policy.next_delay(attempt=attempt, elapsed_seconds=elapsed_seconds)
    if delay is None:
        return Dead(
            code=error.code, message=error.message, recoverable=True, doubtful=error.doubtful
        )
    return Retry(after_seconds=delay, code=error.code, doubtful=error.doubtful)


def _from_a_bug(error: BaseException) -> TransientError:
    """
    An unforeseen exception counts as transient; its text may hold anything, so it stays out.
    """
    name = type(error).__name__
    return TransientError(name, f"The handler failed unexpectedly ({name}).", doubtful=True)

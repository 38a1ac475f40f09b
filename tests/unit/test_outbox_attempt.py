"""
One attempt: whatever the handler does, an outcome comes of it.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.testing import capture_logs

from outbox import Delivered, Destination, Event, RetryPolicy, Skipped, TransientError
from outbox.attempt import about_the_attempt, attempt
from outbox.outcome import Dead, Deferred, Outcome, Retry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[Event, float], Awaitable[Delivered | Skipped]]


def event(**changes: Any) -> Event:  # noqa: ANN401
    """
    A claimed event at its first attempt.
    """
    return Event(
        **{
            "id": 1,
            "destination": "xledger",
            "key": "a",
            "organization_id": uuid4(),
            "version": 1,
            "payload": {},
            "priority": 0,
            "created_at": datetime.now(UTC),
            "attempts": 1,
            "elapsed_seconds": 0.0,
            "claim_token": uuid4(),
            "last_error_code": None,
            "traceparent": None,
            **changes,
        }
    )


def destination(deliver: Handler, **changes: Any) -> Destination:  # noqa: ANN401
    """
    A destination with this handler.
    """

    async def record(_: object, settlements: object) -> None:
        raise NotImplementedError

    async def redrive(limit: int | None) -> int:
        raise NotImplementedError

    return Destination(
        **{
            "name": "xledger",
            "organization_id": uuid4(),
            "deliver": deliver,
            "record": record,
            "redrive": redrive,
            "policy": RetryPolicy(),
            **changes,
        }
    )


def raises(error: BaseException) -> Handler:
    """
    A handler that raises.
    """

    async def deliver(_event: Event, _seconds: float) -> Delivered:
        raise error

    return deliver


async def never_called(_event: Event, _seconds: float) -> Delivered:
    """
    A handler that must not be reached.
    """
    pytest.fail("the handler was called")


async def hangs(_event: Event, _seconds: float) -> Delivered:
    """
    A handler without an end.
    """
    await asyncio.Event().wait()
    raise NotImplementedError


async def attempted(
    deliver: Handler,
    claimed: Event | None = None,
    *,
    waited_seconds: float = 0.0,
    **changes: Any,  # noqa: ANN401
) -> Outcome:
    """
    What an attempt comes to.
    """
    return await attempt(
        claimed or event(),
        destination(deliver, **changes),
        claimed_at=time.monotonic() - waited_seconds,
    )


@pytest.mark.parametrize("answer", [Delivered(), Skipped(reason="other_organization")])
async def test_the_answer_of_the_handler_is_the_outcome(answer: Delivered | Skipped) -> None:
    """
    A handler that returns has decided.
    """

    async def deliver(_event: Event, _seconds: float) -> Delivered | Skipped:
        return answer

    assert await attempted(deliver) is answer


async def test_a_handler_is_told_how_long_it_may_take() -> None:
    """
    No longer than an attempt, and no longer than what the window has left.
    """
    told: list[float] = []

    async def deliver(_event: Event, seconds: float) -> Delivered:
        told.append(seconds)
        return Delivered()

    await attempted(deliver, event(elapsed_seconds=0.0), attempt_seconds=5.0)
    await attempted(deliver, event(elapsed_seconds=12.0, attempts=3), attempt_seconds=5.0)

    assert told == [5.0, 3.0]


async def test_a_hanging_handler_meets_its_deadline() -> None:
    """
    It ends as a failure whose effect is unknown, long before the lease does.
    """
    started = time.monotonic()

    outcome = await attempted(hangs, attempt_seconds=0.05)

    assert outcome == Retry(after_seconds=1, code="timeout", doubtful=True)
    assert time.monotonic() - started < 5


async def test_a_handler_that_hangs_at_the_end_of_the_window_is_dead() -> None:
    """
    The rest of the window is all it gets, and then there is no retry.
    """
    outcome = await attempted(hangs, event(attempts=3, elapsed_seconds=14.95))

    assert isinstance(outcome, Dead)
    assert (outcome.code, outcome.recoverable, outcome.doubtful) == ("timeout", True, True)


async def test_a_timeout_of_the_handlers_own_is_a_timeout() -> None:
    """
    A handler that gave up waiting cannot know whether its request got through.
    """
    assert await attempted(raises(TimeoutError())) == Retry(
        after_seconds=1, code="timeout", doubtful=True
    )


@pytest.mark.parametrize("attempts", [1, 2, 3, 4])
async def test_the_attempt_of_the_event_counts(attempts: int) -> None:
    """
    Three failures are retried, the fourth is the end.
    """
    outcome = await attempted(raises(TransientError("busy", "Busy.")), event(attempts=attempts))

    assert isinstance(outcome, Dead if attempts == 4 else Retry)


async def test_an_event_that_killed_all_its_workers_is_buried_unsent() -> None:
    """
    More claims than attempts means that no attempt ever came back: it does not kill one more.
    """
    outcome = await attempted(never_called, event(attempts=5))

    assert isinstance(outcome, Dead)
    assert (outcome.code, outcome.recoverable) == ("abandoned", False)


async def test_an_attempt_that_would_start_late_is_put_off() -> None:
    """
    A process that stood still for half the lease no longer knows whose claim it is.
    """
    outcome = await attempted(
        never_called, waited_seconds=6.0, lease_seconds=11.0, attempt_seconds=5.0
    )

    assert outcome == Deferred(after_seconds=0, code="late")


async def test_an_attempt_at_the_very_end_of_the_window_is_the_last() -> None:
    """
    No time is left for the request and none for another try: a recovery may bring it back.
    """
    outcome = await attempted(hangs, event(attempts=2, elapsed_seconds=15.0))

    assert isinstance(outcome, Dead)
    assert (outcome.code, outcome.recoverable) == ("timeout", True)


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT 1", None, Exception("gone")),
        InterfaceError("SELECT 1", None, Exception("gone")),
        InternalError("SELECT 1", None, Exception("gone"), connection_invalidated=True),
        PoolTimeout("no connection"),
    ],
    ids=["away", "closed", "a pooler lost it", "none left"],
)
async def test_a_failure_of_our_own_database_is_not_the_events_fault(error: Exception) -> None:
    """
    A handler that could not read what it needs has not failed at the destination.
    """
    outcome = await attempted(raises(error))

    assert outcome == Deferred(after_seconds=1, code="database")


async def test_a_wrong_statement_of_a_handler_is_a_failed_attempt() -> None:
    """
    The database is there; put off again and again, nobody would ever hear of it.
    """
    outcome = await attempted(raises(ProgrammingError("SELEC 1", None, Exception("syntax"))))

    assert isinstance(outcome, Retry)
    assert outcome.code == "ProgrammingError"


async def test_a_cancellation_from_outside_gets_out() -> None:
    """
    Whoever stops the process ends the attempt, and no outcome is invented for it.
    """
    task = asyncio.create_task(attempted(hangs))
    await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_inside_the_handler_is_a_failure() -> None:
    """
    A handler that awaits something cancelled has failed; taken for a shutdown it would be
    sent again at once and for ever, at no cost.
    """
    assert await attempted(raises(asyncio.CancelledError())) == Retry(
        after_seconds=1, code="CancelledError", doubtful=True
    )


async def test_what_is_logged_after_an_attempt_is_not_about_it() -> None:
    """
    Whoever runs one in a task of its own may go on.
    """
    await attempted(raises(ValueError()))

    assert about_the_attempt(None, "info", {"event": "x"}) == {"event": "x"}


async def test_a_failed_attempt_is_logged_without_the_text_of_a_bug() -> None:
    """
    The log names the event and the class of the error, never what the exception says.
    """
    with capture_logs(processors=[about_the_attempt]) as logs:
        await attempted(raises(ValueError("s3cret")), event(key="k", version=7, attempts=2))

    [line] = logs
    assert line["event"] == "outbox.attempt_failed"
    assert (line["key"], line["version"], line["attempt"]) == ("k", 7, 2)
    assert (line["outcome"], line["code"]) == ("retry", "ValueError")
    assert "s3cret" not in repr(logs)

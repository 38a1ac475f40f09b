"""
What a handler may raise, and what it means for the event.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import (
    ConfigurationError,
    DeliveryError,
    OutboxError,
    PermanentError,
    RetryPolicy,
    ThrottledError,
    TransientError,
)
from outbox.errors import CODE_LENGTH, MESSAGE_LENGTH
from outbox.outcome import THROTTLED_SECONDS, Dead, Deferred, Outcome, Retry, decide

POLICY = RetryPolicy()


def decided(error: Exception, *, attempt: int = 1, elapsed_seconds: float = 0.0) -> Outcome:
    """
    What the error of an attempt means, by the usual policy.
    """
    return decide(error, attempt=attempt, elapsed_seconds=elapsed_seconds, policy=POLICY)


@pytest.mark.parametrize(
    "kind", [DeliveryError, TransientError, ThrottledError, PermanentError, ConfigurationError]
)
def test_every_error_of_a_delivery_can_be_stored(kind: type[DeliveryError]) -> None:
    """
    PostgreSQL stores no NUL and a log line is one line, so control characters are left out.
    """
    error = kind("co\x00de\n", "one\r\nsentence\x1b[31m\x00\ud800", doubtful=True)

    assert isinstance(error, OutboxError)
    assert error.code == "code"
    assert error.message == "onesentence[31m"
    assert error.doubtful


def test_long_texts_are_cut() -> None:
    """
    A code or message of any length fits its place.
    """
    error = TransientError("c" * 1000, "m" * 10_000)

    assert error.code == "c" * CODE_LENGTH
    assert error.message == "m" * MESSAGE_LENGTH


@given(st.text(), st.text())
def test_any_text_becomes_storable(code: str, message: str) -> None:
    """
    Whatever a destination sends back, code and message are short, printable and UTF-8.
    """
    error = PermanentError(code, message)

    assert error.code.isprintable()
    assert error.message.isprintable()
    error.message.encode()
    assert len(error.code) <= CODE_LENGTH
    assert len(error.message) <= MESSAGE_LENGTH


@pytest.mark.parametrize("kind", [TransientError, DeliveryError])
@pytest.mark.parametrize("doubtful", [False, True])
def test_a_transient_error_is_retried(kind: type[DeliveryError], *, doubtful: bool) -> None:
    """
    Trying again may help, so the policy says when.
    """
    outcome = decided(kind("busy", "Busy.", doubtful=doubtful), attempt=2)

    assert outcome == Retry(after_seconds=2, code="busy", doubtful=doubtful)


def test_the_last_transient_error_is_the_end_but_recoverable() -> None:
    """
    After the last attempt the event is dead, and a recovery may bring it back.
    """
    outcome = decided(TransientError("busy", "Busy.", doubtful=True), attempt=4)

    assert outcome == Dead(code="busy", message="Busy.", recoverable=True, doubtful=True)


def test_a_transient_error_at_the_end_of_the_window_is_the_end() -> None:
    """
    The window counts, not only the attempts.
    """
    outcome = decided(TransientError("busy", "Busy."), attempt=2, elapsed_seconds=14)

    assert outcome == Dead(code="busy", message="Busy.", recoverable=True)


def test_a_permanent_error_is_the_end_at_once() -> None:
    """
    The first attempt is the last, and no recovery tries it again.
    """
    outcome = decided(PermanentError("gone", "There is no such record.", doubtful=True))

    assert outcome == Dead(
        code="gone", message="There is no such record.", recoverable=False, doubtful=True
    )


@pytest.mark.parametrize("attempt", [1, 4, 40])
def test_throttling_closes_the_gate_for_as_long_as_asked(attempt: int) -> None:
    """
    A wait that was asked for burns nothing, at whatever attempt.
    """
    outcome = decided(
        ThrottledError("throttled", "Wait.", retry_after=17, doubtful=True), attempt=attempt
    )

    assert outcome == Deferred(
        after_seconds=17, code="throttled", closes="throttled", message="Wait.", doubtful=True
    )


def test_throttling_without_a_time_has_one() -> None:
    """
    A destination that does not say how long gets a usual pause.
    """
    outcome = decided(ThrottledError("throttled", "Wait."))

    assert isinstance(outcome, Deferred)
    assert outcome.after_seconds == THROTTLED_SECONDS


@pytest.mark.parametrize("attempt", [1, 4, 40])
def test_a_configuration_error_closes_the_gate(attempt: int) -> None:
    """
    Somebody has to mend the set-up; no event pays for it.
    """
    outcome = decided(ConfigurationError("forbidden", "Not allowed."), attempt=attempt)

    assert outcome == Deferred(
        after_seconds=0, code="forbidden", closes="configuration", message="Not allowed."
    )


@pytest.mark.parametrize("error", [ValueError("s3cret"), KeyError("s3cret"), Exception("s3cret")])
def test_a_bug_in_a_handler_is_retried_and_leaks_nothing(error: Exception) -> None:
    """
    Only the class of an unforeseen exception is kept: its text may hold anything.
    """
    name = type(error).__name__

    assert decided(error) == Retry(after_seconds=1, code=name, doubtful=True)
    end = decided(error, attempt=4)
    assert isinstance(end, Dead)
    assert (end.code, end.recoverable, end.doubtful) == (name, True, True)
    assert "s3cret" not in repr(end)


@pytest.mark.parametrize("attempt", range(1, 9))
@pytest.mark.parametrize(
    "error",
    [
        TransientError("e", "E."),
        DeliveryError("e", "E."),
        ThrottledError("e", "E."),
        PermanentError("e", "E."),
        ConfigurationError("e", "E."),
        OSError("e"),
        ExceptionGroup("e", [ValueError("e")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_ends_in_a_retry_or_a_dead_letter(error: Exception, attempt: int) -> None:
    """
    No exception path deletes an event: it goes again, waits, or becomes a failure with a name.
    """
    outcome = decided(error, attempt=attempt)

    assert isinstance(outcome, (Retry, Deferred, Dead))
    assert outcome.code

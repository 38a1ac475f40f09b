"""
What one process's outcomes say about a destination.
"""

from __future__ import annotations

from uuid import uuid4

import pytest

from outbox import Delivered, Destination, Event, PermanentError, RetryPolicy, Skipped
from outbox.breaker import Breaker, Closing
from outbox.gate import CONFIGURATION, OUTAGE, Backoff
from outbox.outcome import Dead, Deferred, Outcome, Retry, decide

PROBE = uuid4()

RETRY = Retry(after_seconds=1, code="busy")
EXHAUSTED = Dead(code="busy", message="Busy.", recoverable=True)
REFUSED = Dead(code="gone", message="Gone.")
UNSENT = Dead(code="abandoned", message="Every attempt ended with its worker.", unsent=True)
PROBE = uuid4()


def destination(**changes: float) -> Destination:
    """
    A destination that is never called.
    """

    async def deliver(event: Event, seconds: float) -> Delivered:
        raise NotImplementedError

    async def record(_: object, settlements: object) -> None:
        raise NotImplementedError

    async def redrive(limit: int | None) -> int:
        raise NotImplementedError

    return Destination(
        name="xledger",
        organization_id=uuid4(),
        deliver=deliver,
        record=record,
        redrive=redrive,
        policy=RetryPolicy(),
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture
def breaker() -> Breaker:
    """
    One that trips at five keys.
    """
    return Breaker(destination())


def judge(breaker: Breaker, *outcomes: tuple[str, Outcome]) -> None:
    """
    Show it outcomes of ordinary attempts.
    """
    for key, outcome in outcomes:
        assert breaker.judge(key, outcome, probe=None) is outcome


def test_several_keys_failing_in_a_row_are_an_outage(breaker: Breaker) -> None:
    """
    The fifth different key closes the gate, not the fourth.
    """
    judge(breaker, *[(key, RETRY) for key in "abcd"])
    assert not breaker.closings

    judge(breaker, ("e", RETRY))

    assert breaker.closings["outage"] == Closing(
        reason="outage",
        message="Several deliveries in a row failed (busy).",
        backoff=OUTAGE,
        probe=None,
    )


def test_one_key_failing_again_and_again_is_no_outage(breaker: Breaker) -> None:
    """
    While it is retried, one bad key says nothing about the others.
    """
    judge(breaker, *[("a", RETRY)] * 10)

    assert not breaker.closings


def test_one_key_that_used_up_its_attempts_alone_is_an_outage(breaker: Breaker) -> None:
    """
    On a quiet day one key has to be enough: nothing else would show the outage.
    """
    judge(breaker, ("a", RETRY), ("a", RETRY), ("a", RETRY), ("a", EXHAUSTED))

    assert "outage" in breaker.closings


@pytest.mark.parametrize("sign_of_life", [Delivered(), REFUSED], ids=["success", "refusal"])
def test_an_answer_in_between_shows_that_the_destination_lives(
    breaker: Breaker, sign_of_life: Outcome
) -> None:
    """
    After a success or a refusal, counting starts anew.
    """
    judge(breaker, *[(key, RETRY) for key in "abcd"], ("x", sign_of_life), ("e", RETRY))
    judge(breaker, ("x", sign_of_life), ("a", EXHAUSTED))

    assert not breaker.closings


@pytest.mark.parametrize(
    "outcome", [Skipped(reason="other"), Deferred(after_seconds=0, code="late"), UNSENT]
)
def test_what_was_not_sent_says_nothing(breaker: Breaker, outcome: Outcome) -> None:
    """
    Neither a skip nor a deferral proves life, and neither counts as a failure.
    """
    judge(breaker, *[(key, RETRY) for key in "abcd"], ("x", outcome))
    assert not breaker.closings

    judge(breaker, ("e", RETRY))
    assert "outage" in breaker.closings


def test_a_breaker_of_one_key_trips_at_once() -> None:
    """
    How many keys make an outage is the destination's business.
    """
    breaker = Breaker(destination(breaker_keys=1))

    judge(breaker, ("a", RETRY))

    assert "outage" in breaker.closings


def test_resetting_forgets_everything(breaker: Breaker) -> None:
    """
    Once the gate is closed or open, the past says nothing more.
    """
    judge(breaker, *[(key, RETRY) for key in "abcde"])

    breaker.reset()

    assert not breaker.closings
    judge(breaker, *[(key, RETRY) for key in "abcd"])
    assert not breaker.closings


def test_throttling_closes_for_as_long_as_asked(breaker: Breaker) -> None:
    """
    The wait is the destination's, not one of our own that grows.
    """
    outcome = Deferred(after_seconds=17, code="throttled", closes="throttled", message="Wait.")

    judge(breaker, ("a", outcome))

    assert breaker.closings["throttled"] == Closing(
        reason="throttled",
        message="Wait.",
        backoff=Backoff(first_seconds=17, longest_seconds=17),
        probe=None,
    )


def test_a_configuration_error_closes_with_patience(breaker: Breaker) -> None:
    """
    People are slower than networks.
    """
    judge(
        breaker,
        ("a", Deferred(after_seconds=0, code="forbidden", closes="configuration", message="No.")),
    )

    assert breaker.closings["configuration"].backoff is CONFIGURATION


@pytest.mark.parametrize("outcome", [Delivered(), REFUSED], ids=["success", "refusal"])
def test_a_probe_that_was_answered_is_a_recovery(breaker: Breaker, outcome: Outcome) -> None:
    """
    Any answer about the event itself shows that the destination is back.
    """
    assert breaker.judge("a", outcome, probe=PROBE) is outcome
    assert breaker.recovered == PROBE
    assert not breaker.closings


@pytest.mark.parametrize(
    "outcome",
    [
        Retry(after_seconds=4, code="busy", doubtful=True),
        Dead(code="busy", message="Busy.", recoverable=True, doubtful=True),
    ],
    ids=["retry", "exhausted"],
)
def test_a_probe_that_fails_burns_nothing_and_closes_again(
    breaker: Breaker, outcome: Outcome
) -> None:
    """
    The event is not to blame: it waits, and its doubt is kept.
    """
    judged = breaker.judge("a", outcome, probe=PROBE)

    assert isinstance(judged, Deferred)
    assert judged.doubtful
    assert breaker.closings["outage"].probe == PROBE
    assert not breaker.recovered


def test_a_throttled_probe_closes_for_as_long_as_asked(breaker: Breaker) -> None:
    """
    The probe's own closing gives way to the wait that was asked for.
    """
    outcome = Deferred(after_seconds=17, code="throttled", closes="throttled", message="Wait.")

    assert breaker.judge("a", outcome, probe=PROBE) is outcome
    assert breaker.closings["throttled"].probe == PROBE
    assert not breaker.recovered


@pytest.mark.parametrize(
    "outcome", [Skipped(reason="other"), Deferred(after_seconds=0, code="interrupted")]
)
def test_a_probe_that_was_not_sent_proves_nothing(breaker: Breaker, outcome: Outcome) -> None:
    """
    The gate stays as it is, and frees itself for another probe.
    """
    assert breaker.judge("a", outcome, probe=PROBE) is outcome
    assert not breaker.recovered
    assert not breaker.closings


def test_a_probe_that_was_given_up_unsent_proves_nothing(breaker: Breaker) -> None:
    """
    An abandoned event is buried without a request: the destination has answered nothing.
    """
    breaker.judge(
        "a",
        Dead(code="abandoned", message="Every attempt ended with its worker.", unsent=True),
        probe=PROBE,
    )

    assert not breaker.recovered


@pytest.mark.parametrize("lease_seconds", [1.0, 9.9, 10.0])
def test_a_lease_that_an_attempt_could_outlive_is_refused(lease_seconds: float) -> None:
    """
    Half the lease may pass before an attempt starts, so it is more than two attempts long.
    """
    with pytest.raises(ValueError, match="too short"):
        destination(lease_seconds=lease_seconds, attempt_seconds=5.0)


def test_a_lease_of_more_than_two_attempts_is_accepted() -> None:
    """
    The border itself lies on the refused side.
    """
    assert destination(lease_seconds=10.1, attempt_seconds=5.0).lease_seconds == 10.1


def test_a_refusal_of_our_own_proves_nothing(breaker: Breaker) -> None:
    """
    A handler that refuses without asking the destination neither heals nor opens anything.
    """
    error = PermanentError("not_linked", "It is not linked.", unsent=True)
    outcome = decide(error, attempt=1, elapsed_seconds=0, policy=RetryPolicy())

    breaker.judge("a", outcome, probe=PROBE)

    assert not breaker.recovered

"""
When to try again, and when to give up.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import wait_chain, wait_exponential, wait_fixed, wait_random

from outbox import PermanentError, RetryPolicy, TransientError

DYNAMICS_LIKE = RetryPolicy(
    max_attempts=4, wait=wait_exponential(multiplier=1), window_seconds=15.0
)

waits = st.one_of(
    st.floats(0, 100).map(wait_fixed),
    st.builds(
        wait_exponential,
        multiplier=st.floats(0.001, 10),
        max=st.floats(0.1, 1000),
        exp_base=st.floats(1, 10),
    ),
    st.floats(0, 10).map(lambda longest: wait_random(0, longest)),
    st.lists(st.floats(0, 10), min_size=1, max_size=5).map(
        lambda all_: wait_chain(*[wait_fixed(one) for one in all_])
    ),
)
policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 50),
    wait=waits,
    window_seconds=st.floats(0.01, 1000),
)


def test_retries_come_after_one_two_and_four_seconds_and_then_no_more() -> None:
    """
    The first attempt and three retries, each twice as far apart, then it is over.
    """
    delays = [
        DYNAMICS_LIKE.next_delay(attempt=attempt, elapsed_seconds=0) for attempt in (1, 2, 3, 4)
    ]

    assert delays == [1, 2, 4, None]


def test_the_default_policy_is_that_of_the_portal() -> None:
    """
    Whoever names nothing gets three retries within fifteen seconds.
    """
    policy = RetryPolicy()

    assert [policy.next_delay(attempt=n, elapsed_seconds=0) for n in (1, 2, 3, 4)] == [
        1,
        2,
        4,
        None,
    ]
    assert policy.window_seconds == 15


@pytest.mark.parametrize("max_attempts", [1, 2, 3, 7])
def test_exactly_max_attempts_are_made(max_attempts: int) -> None:
    """
    Counting from 1, the last allowed attempt is followed by none, the one before by one more;
    a count that is off by one would cost a retry or make one too many.
    """
    policy = RetryPolicy(max_attempts=max_attempts, wait=wait_fixed(0), window_seconds=1)
    made, again = 0, True
    while again:
        made += 1
        again = policy.next_delay(attempt=made, elapsed_seconds=0) is not None

    assert made == max_attempts


def test_a_retry_is_planned_only_if_there_is_time_left_for_it() -> None:
    """
    A fifteenth of the window has to remain after the delay; else it is time to give up.
    """
    policy = RetryPolicy(max_attempts=9, wait=wait_fixed(5), window_seconds=15)

    assert policy.slack_seconds == 1
    assert policy.next_delay(attempt=1, elapsed_seconds=9) == 5
    assert policy.next_delay(attempt=1, elapsed_seconds=9.1) is None
    assert policy.next_delay(attempt=1, elapsed_seconds=1e9) is None


def test_what_is_left_of_the_window_is_never_negative() -> None:
    """
    An attempt may use the rest of the window, and nothing when it is over.
    """
    assert DYNAMICS_LIKE.remaining_seconds(0) == 15
    assert DYNAMICS_LIKE.remaining_seconds(14) == 1
    assert DYNAMICS_LIKE.remaining_seconds(99) == 0


@pytest.mark.parametrize("attempt", [1, 1024, 1025, 10_000])
def test_a_huge_attempt_number_overflows_nothing(attempt: int) -> None:
    """
    An exponential of any attempt is a number: no overflow may lose an event.
    """
    patient = RetryPolicy(
        max_attempts=100_000, wait=wait_exponential(multiplier=0.5, max=600), window_seconds=1e9
    )

    assert 0 <= patient.delay_after(attempt) <= 600
    assert DYNAMICS_LIKE.delay_after(attempt) >= 1
    assert DYNAMICS_LIKE.next_delay(attempt=attempt, elapsed_seconds=0) in {1, None}


@pytest.mark.parametrize("max_attempts", [0, -1])
def test_a_policy_without_attempts_is_refused(max_attempts: int) -> None:
    """
    Nothing would ever be delivered by it, so it says so at once.
    """
    with pytest.raises(ValueError, match="max_attempts must be at least 1"):
        RetryPolicy(max_attempts=max_attempts)


@pytest.mark.parametrize("window_seconds", [0, -0.1])
def test_a_policy_without_time_is_refused(window_seconds: float) -> None:
    """
    No attempt fits into an empty window.
    """
    with pytest.raises(ValueError, match="window_seconds must be positive"):
        RetryPolicy(window_seconds=window_seconds)


@given(policy=policies, attempt=st.integers(1, 10_000))
def test_no_delay_is_negative(policy: RetryPolicy, attempt: int) -> None:
    """
    Whatever the strategy, waiting takes no less than no time.
    """
    assert policy.delay_after(attempt) >= 0


@given(policy=policies, request_seconds=st.floats(0, 10))
def test_a_schedule_ends_within_window_and_attempts(
    policy: RetryPolicy, request_seconds: float
) -> None:
    """
    Played from the start, every attempt begins within the window and there are never too many.
    """
    attempt, elapsed = 1, 0.0
    while True:
        assert attempt <= policy.max_attempts
        assert elapsed + policy.slack_seconds <= policy.window_seconds * (1 + 1e-9)
        elapsed += min(request_seconds, policy.remaining_seconds(elapsed))
        delay = policy.next_delay(attempt=attempt, elapsed_seconds=elapsed)
        if delay is None:
            return
        elapsed += delay
        attempt += 1


class Xledger:
    """
    A second destination, called inside one process: fails some times, then answers.
    """

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def post(self) -> str:
        """
        Fail as long as there are errors left.
        """
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "posted"


def busy() -> TransientError:
    """
    An error that passes.
    """
    return TransientError("xledger_busy", "Xledger is busy.")


async def test_the_same_policy_retries_a_call_to_another_destination() -> None:
    """
    Inside one process a policy retries what passes, until it passed.
    """
    policy = RetryPolicy(wait=wait_fixed(0))
    xledger = Xledger(busy(), busy(), busy())

    assert await policy.retrying()(xledger.post) == "posted"
    assert xledger.calls == 4


async def test_in_process_retrying_ends_with_the_last_error_itself() -> None:
    """
    After the last attempt the caller sees the error, not a wrapper around it.
    """
    policy = RetryPolicy(max_attempts=2, wait=wait_fixed(0))
    last = busy()
    xledger = Xledger(busy(), last, busy())

    with pytest.raises(TransientError) as caught:
        await policy.retrying()(xledger.post)

    assert caught.value is last
    assert xledger.calls == 2


async def test_in_process_retrying_leaves_other_errors_alone() -> None:
    """
    What cannot pass is raised at once.
    """
    xledger = Xledger(PermanentError("xledger_no_such_account", "There is no such account."))

    with pytest.raises(PermanentError):
        await RetryPolicy(wait=wait_fixed(0)).retrying()(xledger.post)

    assert xledger.calls == 1


async def test_in_process_retrying_does_not_sleep_past_its_window() -> None:
    """
    A wait that would leave the window is not begun.
    """
    xledger = Xledger(busy(), busy())

    with pytest.raises(TransientError):
        await RetryPolicy(wait=wait_fixed(3600), window_seconds=5).retrying()(xledger.post)

    assert xledger.calls == 1

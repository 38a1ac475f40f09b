"""
When to try again, and when to give up.

One `RetryPolicy` serves both ways of waiting: the durable schedule, where the delay is
written to the database and another process may make the next attempt (`next_delay`), and
retrying inside one process (`retrying`), for calls that have no event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
)

from outbox.errors import TransientError

if TYPE_CHECKING:
    from tenacity.wait import wait_base


LONGEST_DELAY_SECONDS = 365 * 86_400.0
"""More than a year is a strategy that has overflowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """
    How often, how far apart and for how long in all.

    Args:
        max_attempts: the first attempt and its retries, counted from 1.
        wait: seconds after a failed attempt; any of tenacity's strategies.
        window_seconds: from the start of the first attempt to the end of the last one,
            waits and requests included.

    Raises:
        ValueError: a policy that could never make an attempt.
    """

    max_attempts: int = 4
    wait: wait_base = field(default_factory=lambda: wait_exponential(multiplier=1))
    window_seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {self.max_attempts}.")
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds must be positive, not {self.window_seconds}.")

    @property
    def slack_seconds(self) -> float:
        """
        How late an attempt may start and still belong to its series: 1 s of 15.

        A retry is planned only if that much is left for it; one that starts later still was
        held up by us, not by the destination, and begins a new window.
        """
        return self.window_seconds / 15

    def delay_after(self, attempt: int) -> float:
        """
        Seconds to wait after this failed attempt; attempts are counted from 1.
        """
        state = RetryCallState(retry_object=AsyncRetrying(), fn=None, args=(), kwargs={})
        state.attempt_number = attempt
        return min(LONGEST_DELAY_SECONDS, max(0.0, float(self.wait(state))))

    def next_delay(self, *, attempt: int, elapsed_seconds: float) -> float | None:
        """
        Seconds until the next attempt, or None when it is time to give up.

        Args:
            attempt: the one that just failed, counted from 1.
            elapsed_seconds: since the first attempt began.
        """
        if attempt >= self.max_attempts:
            return None
        delay = self.delay_after(attempt)
        planned_seconds = elapsed_seconds + delay + self.slack_seconds
        return delay if planned_seconds <= self.window_seconds else None

    def remaining_seconds(self, elapsed_seconds: float) -> float:
        """
        What is left of the window for an attempt that starts now; never negative.
        """
        return max(0.0, self.window_seconds - elapsed_seconds)

    def retrying(self) -> AsyncRetrying:
        """
        The same policy for a call inside this process; only transient errors are retried,
        and the last error is raised as it is.
        """
        return AsyncRetrying(
            wait=self.wait,
            stop=stop_after_attempt(self.max_attempts) | stop_before_delay(self.window_seconds),
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )

"""
Service protection limits: how much one user may ask of Dataverse.

Source: Microsoft Learn, "Service protection API limits". Three measures per user and web
server, the defaults being 6,000 requests and 20 minutes of execution time in a sliding
window of 5 minutes, and 52 requests at once. An application user counts as any user. The
sandbox is one web server.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SOURCE = 'Microsoft Learn: "Service protection API limits"'

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class Limits(BaseModel):
    """
    What one user may do; None lifts a limit.

    Args:
        window_seconds: length of the sliding window of the first and the third.
        requests: in the window.
        concurrency: requests at once.
        execution_seconds: of all requests in the window together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_seconds: Seconds = 300.0
    requests: Count | None = 6_000
    concurrency: Count | None = 52
    execution_seconds: Seconds | None = 1_200.0

    @classmethod
    def none(cls) -> Limits:
        """
        Everything is allowed, for measuring a client.
        """
        return cls(requests=None, concurrency=None, execution_seconds=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """
    A limit that was met.

    Args:
        code: Dataverse's error code.
        retry_after: whole seconds to keep away, at least 1.
    """

    code: str
    message: str
    retry_after: int


@dataclass(slots=True)
class _Usage:
    arrivals: deque[float] = field(default_factory=deque)
    spent: deque[tuple[float, float]] = field(default_factory=deque)  # (when, seconds)
    spent_seconds: float = 0.0  # the sum of the above
    under_way: int = 0

    def forget_before(self, horizon: float) -> None:
        while self.arrivals and self.arrivals[0] <= horizon:
            self.arrivals.popleft()
        while self.spent and self.spent[0][0] <= horizon:
            self.spent_seconds -= self.spent.popleft()[1]


class Limiter:
    """
    The usage of every user, measured against the limits.
    """

    def __init__(self) -> None:
        self._usage: dict[str, _Usage] = defaultdict(_Usage)

    def enter(self, user: str, limits: Limits, *, now: float) -> Excess | None:
        """
        Count a request that arrives, and say what it exceeds.

        A refused request counts too: "pushing on" lengthens the wait.

        Args:
            user: client id of the application user.
            limits: those in force now.
            now: monotonic seconds.

        Returns:
            None if it may go on. Call `leave` in both cases.
        """
        usage = self._usage[user]
        usage.under_way += 1
        usage.forget_before(now - limits.window_seconds)
        if limits.requests is not None:
            usage.arrivals.append(now)
        for measure in (_too_many_at_once, _too_many, _too_long):
            if excess := measure(usage, limits, now):
                return excess
        return None

    def leave(self, user: str, limits: Limits, *, started_at: float, now: float) -> None:
        """
        Count what a request took; it is no longer under way.
        """
        usage = self._usage[user]
        usage.under_way -= 1
        if limits.execution_seconds is not None:
            usage.spent.append((now, now - started_at))
            usage.spent_seconds += now - started_at


def _too_many(usage: _Usage, limits: Limits, now: float) -> Excess | None:
    if limits.requests is None or len(usage.arrivals) <= limits.requests:
        return None
    last_to_expire = usage.arrivals[len(usage.arrivals) - limits.requests]
    return Excess(
        code="0x80072322",
        message=f"Number of requests exceeded the limit of {limits.requests}"
        f" over time window of {limits.window_seconds:g} seconds.",
        retry_after=_whole(last_to_expire + limits.window_seconds - now),
    )


def _too_many_at_once(usage: _Usage, limits: Limits, _now: float) -> Excess | None:
    if limits.concurrency is None or usage.under_way <= limits.concurrency:
        return None
    return Excess(
        code="0x80072326",
        message=f"Number of concurrent requests exceeded the limit of {limits.concurrency}.",
        # The documentation gives no figure for this one; the sandbox says: soon.
        retry_after=_whole(usage.under_way / limits.concurrency - 1),
    )


def _too_long(usage: _Usage, limits: Limits, now: float) -> Excess | None:
    if limits.execution_seconds is None:
        return None
    surplus = usage.spent_seconds - limits.execution_seconds
    if surplus <= 0:
        return None
    return Excess(
        code="0x80072321",
        message="Combined execution time of incoming requests exceeded limit of"
        f" {limits.execution_seconds:g} seconds over time window of"
        f" {limits.window_seconds:g} seconds. Decrease number of concurrent requests or reduce"
        " the duration of requests and try again later.",
        retry_after=_whole(_paid_off(usage, surplus) + limits.window_seconds - now),
    )


def _paid_off(usage: _Usage, surplus: float) -> float:
    """
    When the request finished whose leaving the window brings the sum down to the limit.
    """
    for when, seconds in usage.spent:
        surplus -= seconds
        if surplus <= 0:
            return when
    return usage.spent[-1][0]


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))

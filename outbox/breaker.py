"""
The breaker: what one process's outcomes say about the destination itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.gate import Backoff
from outbox.outcome import AutomaticReason, Dead, Deferred, Delivered, Outcome, Retry, Skipped

if TYPE_CHECKING:
    from outbox.destination import Destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """
    A gate that has to be closed.

    Args:
        probing: it was half-open, and the probe failed.
    """

    reason: AutomaticReason
    message: str
    backoff: Backoff
    probing: bool


class Breaker:
    """
    Sees outages, and what a probe proves.

    It trips when several different keys failed in a row, or when one key used up all its
    attempts and nothing succeeded meanwhile. An answer about the event itself, also an
    unwelcome one, shows that the destination lives.

    Attributes:
        closings: what has to be closed; whoever closed it calls `reset`.
        recovered: a probe came through; whoever opened the gate calls `reset`.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._failing: set[str] = set()
        self.closings: dict[AutomaticReason, Closing] = {}
        self.recovered = False

    def judge(self, key: str, outcome: Outcome, *, probing: bool) -> Outcome:
        """
        Take note of an outcome, and say what it is in the light of the destination's health.
        """
        if probing:
            outcome = self._judge_probe(outcome)
        elif self._trips(key, outcome):
            self._close("outage", "Several deliveries in a row failed", outcome, probing=False)
        if isinstance(outcome, Deferred) and outcome.closes is not None:
            self._close(outcome.closes, outcome.message, outcome, probing=probing)
        return outcome

    def reset(self) -> None:
        """
        Forget what was seen: the gate has been closed, or opened.
        """
        self._failing.clear()
        self.closings.clear()
        self.recovered = False

    def _trips(self, key: str, outcome: Outcome) -> bool:
        match outcome:
            case Delivered() | Dead(recoverable=False):
                self._failing.clear()
                return False
            case Skipped() | Deferred():
                return False
            case Retry() | Dead():
                exhausted_alone = isinstance(outcome, Dead) and key in self._failing
                self._failing.add(key)
                return exhausted_alone or len(self._failing) >= self._destination.breaker_keys

    def _judge_probe(self, outcome: Outcome) -> Outcome:
        """
        A probe that fails like an outage burns nothing.
        """
        match outcome:
            case Delivered() | Dead(recoverable=False):
                self.recovered = True
                return outcome
            case Retry() | Dead():
                return Deferred(
                    after_seconds=0,
                    code=outcome.code,
                    closes="outage",
                    message="A probe failed",
                    doubtful=outcome.doubtful,
                )
            case Deferred() | Skipped():
                return outcome

    def _close(
        self, reason: AutomaticReason, message: str, outcome: Outcome, *, probing: bool
    ) -> None:
        code = getattr(outcome, "code", None)
        self.closings[reason] = Closing(
            reason=reason,
            message=f"{message} ({code})." if reason == "outage" else message,
            backoff=self._backoff(reason, outcome),
            probing=probing,
        )

    def _backoff(self, reason: AutomaticReason, outcome: Outcome) -> Backoff:
        match reason:
            case "throttled":
                asked = getattr(outcome, "after_seconds", 0.0)
                return Backoff(first_seconds=asked, longest_seconds=asked)
            case "configuration":
                return self._destination.configuration
            case "outage":
                return self._destination.outage

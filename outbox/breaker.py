"""
The breaker: what one process's outcomes say about the destination itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.gate import Backoff
from outbox.outcome import AutomaticReason, Dead, Deferred, Delivered, Outcome, Retry, Skipped

if TYPE_CHECKING:
    from uuid import UUID

    from outbox.destination import Destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """
    A gate that has to be closed.

    Args:
        probe: it was half-open, and this probe failed.
    """

    reason: AutomaticReason
    message: str
    backoff: Backoff
    probe: UUID | None


class Breaker:
    """
    Sees outages, and what a probe proves.

    It trips when several different keys failed in a row, or when one key used up all its
    attempts and nothing succeeded meanwhile. An answer about the event itself, also an
    unwelcome one, shows that the destination lives.

    Attributes:
        closings: what has to be closed; whoever closed it calls `reset`.
        recovered: the probe that came through; whoever opened the gate calls `reset`.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._failing: set[str] = set()
        self.closings: dict[AutomaticReason, Closing] = {}
        self.recovered: UUID | None = None

    def judge(self, key: str, outcome: Outcome, *, probe: UUID | None) -> Outcome:
        """
        Take note of an outcome, and say what it is in the light of the destination's health.

        Args:
            probe: token, if the attempt was the probe of a half-open gate.
        """
        if probe is not None:
            outcome = self._judge_probe(outcome, probe)
        elif self._trips(key, outcome):
            self._close("outage", "Several deliveries in a row failed", outcome, probe=None)
        if isinstance(outcome, Deferred) and outcome.closes is not None:
            self._close(outcome.closes, outcome.message, outcome, probe=probe)
        return outcome

    def reset(self) -> None:
        """
        Forget what was seen: the gate has been closed, or opened.
        """
        self._failing.clear()
        self.closings.clear()
        self.recovered = None

    def _trips(self, key: str, outcome: Outcome) -> bool:
        match outcome:
            case Skipped() | Deferred() | Dead(unsent=True):
                return False
            case Delivered() | Dead(recoverable=False):
                self._failing.clear()
                return False
            case Retry() | Dead():
                exhausted_alone = isinstance(outcome, Dead) and key in self._failing
                self._failing.add(key)
                return exhausted_alone or len(self._failing) >= self._destination.breaker_keys

    def _judge_probe(self, outcome: Outcome, probe: UUID) -> Outcome:
        """
        A probe that fails like an outage burns nothing.
        """
        match outcome:
            case Deferred() | Skipped() | Dead(unsent=True):
                return outcome
            case Delivered() | Dead(recoverable=False):
                self.recovered = probe
                return outcome
            case Retry() | Dead():
                return Deferred(
                    after_seconds=0,
                    code=outcome.code,
                    closes="outage",
                    message="A probe failed",
                    doubtful=outcome.doubtful,
                )

    def _close(
        self, reason: AutomaticReason, message: str, outcome: Outcome, *, probe: UUID | None
    ) -> None:
        code = getattr(outcome, "code", None)
        self.closings[reason] = Closing(
            reason=reason,
            message=f"{message} ({code})." if reason == "outage" else message,
            backoff=self._backoff(reason, outcome),
            probe=probe,
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

"""
Who wants to know what a relay does, for progress and for figures.

The relay tells, and asks nothing back: what an observer does must be quick and must not fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox.outcome import Outcome, Settlement


class Observer:
    """
    Hears everything and does nothing; override what matters.
    """

    def turned(self, *, seconds: float, claimed: int) -> None:
        """
        A transaction of the loop is committed: it settled what had landed, and claimed.

        Args:
            seconds: it took.
            claimed: how many events.
        """

    def attempted(self, outcome: Outcome, *, seconds: float) -> None:
        """
        A delivery was tried.

        Args:
            seconds: it took, whatever came of it.
        """

    def settled(self, settlements: Sequence[Settlement]) -> None:
        """
        This is committed: others see it by now.
        """

    def lost(self, claims: int) -> None:
        """
        The leases of so many claims had ended before their results could be written.
        """

    def redriven(self, keys: int) -> None:
        """
        The current state of so many keys was enqueued again after an outage.
        """

    def stopping(self) -> None:
        """
        Nothing more is claimed.
        """


UNOBSERVED = Observer()
"""For whom nobody wants to know."""

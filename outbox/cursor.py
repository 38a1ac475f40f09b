"""
Where claims go on in a backlog: after the last one, and now and then from the start.

An event that is gone leaves its entry in the index until no snapshot can see it any more. As
long as some session holds an old one, claims that begin at the start read all those entries,
more and more of them. Going on after the last claim reads none, but overlooks what comes in
before that place: so a share of the time goes into looking at everything.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from outbox.store import START

if TYPE_CHECKING:
    from outbox.store import Claimed, Position

FULL_LOOK_SHARE = 0.02
"""Of the time, at most, goes into claims from the start of a backlog."""


class Cursor:
    """
    The place of one relay in the backlog of its destination.
    """

    def __init__(self) -> None:
        self._position = START
        self._begun_at = 0.0
        self._full_look_at = 0.0

    def begin(self) -> Position:
        """
        Where the claim that is about to be made should begin.
        """
        self._begun_at = time.monotonic()
        if self._begun_at >= self._full_look_at:
            self._position = START
        return self._position

    def move(self, claimed: Claimed, *, wanted: int) -> bool:
        """
        Go on after what was claimed; True: there may be more before or among it, so look again.

        A claim that found less than it wanted has seen the end, and the next begins at the start.
        """
        looked_at_all = self._position == START
        if looked_at_all:
            now = time.monotonic()
            self._full_look_at = now + (now - self._begun_at) / FULL_LOOK_SHARE
        short = claimed.due < wanted
        self._position = START if short else claimed.last
        return short and (claimed.is_overtaken or not looked_at_all)

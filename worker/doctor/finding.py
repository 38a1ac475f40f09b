"""
What was found, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "broken", "unreachable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """
    One thing that was looked at.

    Args:
        says: what was found, one sentence.
        cure: what to do about it; "" if it is well.
    """

    about: str
    verdict: Verdict
    says: str
    cure: str = ""


def well(about: str, says: str) -> Finding:
    """
    Nothing to do.
    """
    return Finding(about=about, verdict="ok", says=says)


def broken(about: str, says: str, cure: str) -> Finding:
    """
    A person has to mend it.
    """
    return Finding(about=about, verdict="broken", says=says, cure=cure)


def unreachable(about: str, says: str, cure: str) -> Finding:
    """
    It may come back by itself.
    """
    return Finding(about=about, verdict="unreachable", says=says, cure=cure)


def warning(about: str, says: str, cure: str) -> Finding:
    """
    It goes on like this, and somebody should know.
    """
    return Finding(about=about, verdict="warning", says=says, cure=cure)

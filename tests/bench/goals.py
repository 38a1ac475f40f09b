"""
Goals: how figures of one run have to compare, decided without looking at a clock.

A ratio is taken inside each round, of two turns that were minutes apart at most, and the
median of these ratios is what counts: a machine that gets slower meanwhile slows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.bench.measure import Figure

Verdict = Literal["met", "not met", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """
    A figure has to be at least, or at most, so many times another one.

    Args:
        factor: of the other one.
        whom: names of contenders, the best of which is meant; empty for a fixed value.
        called: what to call them, or the fixed value, in the report.
        value: the fixed value.
    """

    factor: float
    whom: Sequence[str] = ()
    called: str
    value: float = 1.0

    @property
    def sentence(self) -> str:
        """
        For people.
        """
        if not self.whom and self.factor == 1:
            return self.called
        if not self.whom and self.value == 1:
            return f"{self.factor:g}"
        return f"{self.factor:g} × {self.called}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """
    What is wanted of one figure.

    Args:
        what, unit: of the figure, and of those it is compared with.
        who: whose figure it is.
        most: more is worse, so bounds are upper ones.
        bounds: it is met with any of them.
    """

    what: str
    unit: str
    who: str = "ours"
    most: bool = False
    bounds: Sequence[Bound]

    @property
    def sentence(self) -> str:
        """
        For people.
        """
        sign = "≤" if self.most else "≥"
        wanted = " or ".join(bound.sentence for bound in self.bounds)
        return f"{self.what}, {self.unit}: {self.who} {sign} {wanted}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """
    A goal beside what was measured.

    Args:
        measured: the median of the figure.
        compared: name and median of what each bound was compared with, and the ratio.
        why: it was not measured.
    """

    sentence: str
    unit: str
    verdict: Verdict
    measured: float | None = None
    compared: Sequence[Comparison] = ()
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """
    A figure divided by another one.
    """

    against: str
    value: float
    ratio: float
    factor: float


def judge(goal: Goal, figures: Sequence[Figure]) -> Judgement:
    """
    Whether the goal is met.
    """
    found = {one.who: one for one in figures if (one.what, one.unit) == (goal.what, goal.unit)}
    ours = found.get(goal.who)
    if ours is None or ours.median is None:
        return _unmeasured(goal, _why_not(goal, figures))
    compared = [
        comparison
        for bound in goal.bounds
        if (comparison := _compare(ours, bound, found.values(), most=goal.most)) is not None
    ]
    if not compared:
        return _unmeasured(goal, f"nothing to compare with: {goal.bounds[0].called}")
    reached = any(
        one.ratio <= one.factor if goal.most else one.ratio >= one.factor for one in compared
    )
    return Judgement(
        sentence=goal.sentence,
        unit=goal.unit,
        verdict="met" if reached else "not met",
        measured=ours.median,
        compared=compared,
    )


def _unmeasured(goal: Goal, why: str) -> Judgement:
    return Judgement(sentence=goal.sentence, unit=goal.unit, verdict="not measured", why=why)


def _why_not(goal: Goal, figures: Sequence[Figure]) -> str:
    in_setting = {one.who: one for one in figures if one.what == goal.what}
    if not in_setting:
        return "no part of this run"
    if goal.who not in in_setting:
        return f"{goal.who} did not take part"
    return in_setting[goal.who].failed


def _compare(
    ours: Figure, bound: Bound, figures: Iterable[Figure], *, most: bool
) -> Comparison | None:
    assert ours.median is not None
    if not bound.whom:
        return Comparison(
            against=bound.called,
            value=bound.value,
            ratio=ours.median / bound.value,
            factor=bound.factor,
        )
    rivals = {one.who: one for one in figures if one.who in bound.whom}
    medians = [(one.median, who) for who, one in rivals.items() if one.median is not None]
    if not medians:
        return None
    value, best = (min if most else max)(medians)
    ratio = _paired_ratio(ours, rivals[best])
    if ratio is None:
        return None
    return Comparison(against=best, value=value, ratio=ratio, factor=bound.factor)


def _paired_ratio(ours: Figure, other: Figure) -> float | None:
    """
    The median, over rounds, of one figure divided by the other one.
    """
    ratios = [
        mine / theirs
        for mine, theirs in zip(ours.rounds, other.rounds, strict=True)
        if mine is not None and theirs
    ]
    return median(ratios) if ratios else None

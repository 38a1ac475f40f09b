"""
Whether a goal is met, told from figures alone.
"""

from __future__ import annotations

import pytest

from tests.bench.goals import Bound, Goal, judge
from tests.bench.measure import Figure

RATE = "events/s"


def figure(who: str, *rounds: float | None, unit: str = RATE, failed: str = "") -> Figure:
    """
    Of one setting.
    """
    return Figure(what="drain", who=who, unit=unit, rounds=rounds, failed=failed)


def goal(*bounds: Bound, most: bool = False) -> Goal:
    """
    Of that setting.
    """
    return Goal(what="drain", unit=RATE, most=most, bounds=bounds)


def peers(factor: float) -> Bound:
    """
    The best of two.
    """
    return Bound(factor=factor, whom=("one", "other"), called="best peer")


def test_a_ratio_is_taken_inside_each_round() -> None:
    """
    A machine that was half as fast in some rounds changes no ratio, but it does change medians.
    """
    figures = [figure("ours", 200, 100, 210), figure("one", 100, 50, 300)]

    judgement = judge(goal(peers(1.5)), figures)

    assert judgement.verdict == "met"
    assert [one.ratio for one in judgement.compared] == [2]


def test_the_best_peer_is_the_one_with_the_best_median() -> None:
    """
    The fastest where more is better, the cheapest where less is.
    """
    figures = [figure("ours", 10), figure("one", 20), figure("other", 30)]

    most = judge(goal(peers(1)), figures).compared
    least = judge(goal(peers(1), most=True), figures).compared

    assert [one.against for one in (*most, *least)] == ["other", "one"]


def test_an_upper_bound_is_met_from_below() -> None:
    """
    At most 0.7 times: 6 of 10 is, 8 of 10 is not.
    """
    bound = peers(0.7)

    cheap = judge(goal(bound, most=True), [figure("ours", 6), figure("one", 10)])
    dear = judge(goal(bound, most=True), [figure("ours", 8), figure("one", 10)])

    assert (cheap.verdict, dear.verdict) == ("met", "not met")


def test_one_of_several_bounds_is_enough() -> None:
    """
    Below a fixed value, or well below somebody else's.
    """
    bounds = (Bound(factor=1, called="5", value=5), peers(0.8))

    slow_machine = judge(goal(*bounds, most=True), [figure("ours", 7), figure("one", 10)])
    nobody_else = judge(goal(*bounds, most=True), [figure("ours", 4)])
    neither = judge(goal(*bounds, most=True), [figure("ours", 9), figure("one", 10)])

    assert [one.verdict for one in (slow_machine, nobody_else, neither)] == [
        "met",
        "met",
        "not met",
    ]


@pytest.mark.parametrize(
    ("bound", "sentence"),
    [
        (peers(0.8), "0.8 × best peer"),
        (peers(1), "1 × best peer"),
        (Bound(factor=1, called="2.6", value=2.6), "2.6"),
        (Bound(factor=0.75, called="1"), "0.75"),
        (Bound(factor=0.9, called="1,000 (50 / 50 ms)", value=1000), "0.9 × 1,000 (50 / 50 ms)"),
    ],
)
def test_a_bound_reads_like_one(bound: Bound, sentence: str) -> None:
    """
    Somebody else's figure has a factor, a fixed value is written as itself.
    """
    assert goal(bound).sentence == f"drain, events/s: ours ≥ {sentence}"


def test_rounds_in_which_either_failed_do_not_count() -> None:
    """
    They have no ratio.
    """
    figures = [figure("ours", 10, None, 30), figure("one", None, 10, 10)]

    assert judge(goal(peers(3)), figures).compared[0].ratio == 3


def test_a_goal_without_figures_is_not_met_silently() -> None:
    """
    It says why.
    """
    absent = judge(goal(peers(1)), [figure("one", 10)])
    failed = judge(goal(peers(1)), [figure("ours", None, unit="", failed="It ended with 78.")])
    alone = judge(goal(peers(1)), [figure("ours", 10)])
    nothing = judge(goal(peers(1)), [])

    judgements = (absent, failed, alone, nothing)
    assert {one.verdict for one in judgements} == {"not measured"}
    assert [one.why for one in judgements] == [
        "ours did not take part",
        "It ended with 78.",
        "nothing to compare with: best peer",
        "no part of this run",
    ]

"""
Latency: which events count, and percentiles.
"""

from __future__ import annotations

import pytest

from tests.bench.latency import milliseconds, percentile

SECOND = 1_000_000_000


def test_what_was_committed_to_a_cold_worker_does_not_count() -> None:
    """
    Warm is a second after the first arrival.
    """
    committed = [(0, "cold"), (5 * SECOND, "cool"), (7 * SECOND, "warm")]
    arrived = [(5 * SECOND, "cold"), (5 * SECOND, "cool"), (7 * SECOND + 3_000_000, "warm")]

    assert milliseconds(committed, arrived) == [3]


def test_the_first_arrival_counts() -> None:
    """
    A second one is another attempt.
    """
    committed = [(0, "cold"), (9 * SECOND, "key")]
    arrived = [(0, "cold"), (9 * SECOND + 1_000_000, "key"), (10 * SECOND, "key")]

    assert milliseconds(committed, arrived) == [1]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_a_percentile_is_a_value_that_was_measured(share: float, value: int) -> None:
    """
    The smallest one that so large a share does not exceed.
    """
    assert percentile(range(1, 101), share) == value

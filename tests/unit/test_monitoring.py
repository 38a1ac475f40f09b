"""
When a worker counts as ready, and what it tells under which names.
"""

from __future__ import annotations

from typing import Any, get_args
from uuid import UUID

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from outbox import Delivered, Destination, RetryPolicy, Settlement
from outbox.outcome import Outcome, Retry
from worker import nightly
from worker.monitoring.figures import Figures
from worker.monitoring.metrics import ANSWERS, NIGHT, OUTCOMES, Metrics
from worker.monitoring.telling import FiguresCollector
from worker.monitoring.watching import Watch, patience

HLF = UUID("00000000-0000-4000-8000-000000000001")


OURS = "organization_id"
"""The label that is on all of them."""


class Clock:
    """
    Monotonic seconds, as the test has them.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """
        What time it is.
        """
        return self.now


@pytest.fixture
def clock() -> Clock:
    """
    That of a watch.
    """
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    """
    Of a worker that has just begun.
    """
    return Metrics(organization_id=HLF, version="1.2.3", revision="0005")


@pytest.fixture
def watch(metrics: Metrics, clock: Clock) -> Watch:
    """
    On the relay of Dynamics.
    """
    return Watch("dynamics", metrics.of("dynamics"), patience_seconds=5, clock=clock)


def told(collector: Any) -> dict[tuple[str, ...], float]:  # noqa: ANN401 (prometheus_client)
    """
    By name and values of labels, the organisation's left out; no buckets.
    """
    families = text_string_to_metric_families(generate_latest(collector).decode())
    samples = [one for family in families for one in family.samples if "le" not in one.labels]
    return {
        (one.name, *(one.labels[name] for name in sorted({*one.labels} - {OURS}))): one.value
        for one in samples
    }


async def _nothing(*_: object) -> Any:  # noqa: ANN401
    raise NotImplementedError


def destination(**changes: Any) -> Destination:  # noqa: ANN401
    """
    Dynamics, as far as it matters here.
    """
    return Destination(
        **{
            "name": "dynamics",
            "organization_id": HLF,
            "deliver": _nothing,
            "record": _nothing,
            "redrive": _nothing,
            "policy": RetryPolicy(),
            **changes,
        }
    )


# --------------------------------------------------------------------------- readiness


def test_a_relay_that_never_had_an_answer_is_not_ready(watch: Watch) -> None:
    """
    It has only just begun, or never gets to its database.
    """
    assert watch.trouble == "The relay of dynamics has had no answer from the database yet."


def test_a_relay_is_ready_for_as_long_as_its_last_answer_is_young(
    watch: Watch, clock: Clock
) -> None:
    """
    And again with the next one.
    """
    watch.turned(seconds=0.01, claimed=0)
    clock.now += 5
    assert watch.trouble is None

    clock.now += 2
    assert watch.trouble == "The relay of dynamics has had no answer from the database for 7 s."

    watch.turned(seconds=0.01, claimed=0)
    assert watch.trouble is None


def test_a_relay_that_was_told_to_stop_is_not_ready_however_young_its_answer(watch: Watch) -> None:
    """
    It settles what lands, and claims nothing more.
    """
    watch.turned(seconds=0.01, claimed=0)
    watch.stopping()

    assert watch.trouble == "It was told to stop and claims nothing more."


@pytest.mark.parametrize(
    ("own_poll", "attempt", "seconds"), [(None, 5, 7), (None, 1, 5), (10, 5, 25)]
)
def test_patience_is_two_polls_and_an_attempt_but_never_less_than_five_seconds(
    own_poll: float | None, attempt: float, seconds: float
) -> None:
    """
    A relay whose places are all taken asks nothing until one is free.
    """
    one = destination(poll_seconds=own_poll, attempt_seconds=attempt)

    assert patience(one, poll_seconds=1) == seconds


# ----------------------------------------------------------------------------- metrics


def settlement(**changes: Any) -> Settlement:  # noqa: ANN401
    """
    A delivery.
    """
    return Settlement(
        **{
            "event_id": 1,
            "destination": "dynamics",
            "key": "canary-key",
            "organization_id": HLF,
            "version": 1,
            "payload": {},
            "outcome": Delivered(),
            "ending": "delivered",
            "retries": 0,
            **changes,
        }
    )


def test_what_a_relay_tells_is_counted(metrics: Metrics, watch: Watch) -> None:
    """
    Each ending by its name, and no key anywhere.
    """
    watch.turned(seconds=0.25, claimed=3)
    watch.attempted(Delivered(), seconds=0.5)
    watch.attempted(Retry(after_seconds=1, code="busy"), seconds=2)
    watch.settled([settlement(), settlement(ending="superseded")])
    watch.settled([settlement(ending=None, outcome=Retry(after_seconds=1, code="busy"))])
    watch.lost(2)
    watch.redriven(4)

    found = told(metrics.registry)
    name = "hlf_sync_attempts_total"
    assert {key[2]: number for key, number in found.items() if key[0] == name} == {
        "delivered": 1,
        "superseded": 1,
        "dead": 0,
        "skipped": 0,
        "retry": 1,
        "deferred": 0,
    }
    assert found["hlf_sync_claims_total", "dynamics"] == 3
    assert found["hlf_sync_lost_claims_total", "dynamics"] == 2
    assert found["hlf_sync_redriven_total", "dynamics"] == 4
    assert found["hlf_sync_request_duration_seconds_sum", "dynamics", "delivered"] == 0.5
    assert found["hlf_sync_request_duration_seconds_count", "dynamics", "retry"] == 1
    assert found["hlf_sync_transaction_duration_seconds_sum", "dynamics"] == 0.25
    assert found["hlf_sync_relay_last_round_trip_timestamp_seconds", "dynamics"] > 1.7e9
    assert found["hlf_sync_build_info", "0005", "1.2.3"] == 1
    assert b"canary" not in generate_latest(metrics.registry)


def test_only_jobs_that_are_known_become_labels(metrics: Metrics) -> None:
    """
    What stands in a row of the database cannot grow the number of series.
    """
    metrics.succeeded("nightly", at=5)
    metrics.succeeded("nightly_anything", at=5)

    jobs = {key for key in told(metrics.registry) if "last_success" in key[0]}
    assert jobs == {("hlf_sync_last_success_timestamp_seconds", "nightly")}


def test_every_outcome_has_its_place() -> None:
    """
    A new one would end a relay that is watched, and no other.
    """
    names = {one.__name__.lower() for one in get_args(Outcome)}

    assert names == set(ANSWERS)
    assert names <= set(OUTCOMES)


def test_every_part_of_the_night_is_a_job() -> None:
    """
    The two lists are one.
    """
    assert tuple(name for name, _ in nightly.PARTS) == NIGHT


FIGURES = Figures(
    revision="0005",
    queues=[{"destination": "dynamics", "waiting": 3, "in_flight": 2, "oldest_seconds": 61.5}],
    failures=[{"wanted": "hide", "recoverable": False, "mentors": 4}],
    wrongly_visible_seconds=90.0,
    gates=[
        {"destination": "reminders", "state": "closed", "reason": "operator", "closed_until": None}
    ],
    jobs={},
)


def test_an_answer_of_the_database_is_told_for_every_destination() -> None:
    """
    Also for one where nothing waits and whose gate never closed.
    """
    found = told(FiguresCollector(FIGURES, ["dynamics", "reminders"], organization_id=HLF))

    assert found["hlf_sync_database_up",] == 1
    assert found["hlf_sync_events", "dynamics", "waiting"] == 3
    assert found["hlf_sync_events", "dynamics", "in_flight"] == 2
    assert found["hlf_sync_events", "reminders", "waiting"] == 0
    assert found["hlf_sync_oldest_event_age_seconds", "dynamics"] == 61.5
    assert found["hlf_sync_wrongly_visible_seconds",] == 90
    assert found["hlf_sync_open_failures", "false", "hide"] == 4
    assert found["hlf_sync_open_failures", "true", "show"] == 0
    states = {key[1:]: number for key, number in found.items() if key[0] == "hlf_sync_gate_state"}
    assert states == {
        ("dynamics", "open"): 1,
        ("dynamics", "half-open"): 0,
        ("dynamics", "closed"): 0,
        ("reminders", "open"): 0,
        ("reminders", "half-open"): 0,
        ("reminders", "closed"): 1,
    }
    assert found["hlf_sync_gate_reason", "reminders", "operator"] == 1
    assert found["hlf_sync_gate_reason", "dynamics", "outage"] == 0
    until = "hlf_sync_gate_closed_until_timestamp_seconds"
    assert found[until, "reminders"] == float("inf")
    assert (until, "dynamics") not in found


def test_without_an_answer_nothing_is_told_that_nobody_knows() -> None:
    """
    No zero that would look like an empty outbox.
    """
    collector = FiguresCollector(None, ["dynamics"], organization_id=HLF)

    assert told(collector) == {("hlf_sync_database_up",): 0}

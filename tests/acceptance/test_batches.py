"""
Many values in one request: each mentor fares as if alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.site import NEXT_YEAR
from worker.dynamics.sandbox import Hang, Status, overlaps

if TYPE_CHECKING:
    from tests.acceptance.site import Site
    from worker.dynamics.sandbox import Entry


BELIEVED_EMPTY = """
UPDATE pg_class
   SET reltuples = 0, relpages = greatest(1, pg_relation_size(oid) / 8192)
 WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'outbox'::regnamespace)
"""


@pytest.fixture(autouse=True)
def _batches_of_50(site: Site) -> None:
    site.environment["HLF_SYNC_BATCH"] = "50"


def batches(site: Site) -> list[Entry]:
    """
    The requests that were batches.
    """
    return [entry for entry in site.requests() if entry.kind == "batch"]


def operations(site: Site) -> list[Entry]:
    """
    The values that were written, in batches and alone.
    """
    return [entry for entry in site.requests() if entry.kind == "data"]


async def test_a_backlog_goes_in_few_requests(site: Site) -> None:
    """
    1,000 mentors in batches of 50: about 20 requests, and each mentor is told once.
    """
    mentors = await site.world.mentors(1000)
    site.link(mentors)
    await site.run("expire")

    drained = await site.run("drain", "--json")

    assert drained.code == 0, drained
    assert drained.document["delivered"] == 1000
    assert await site.wrongs() == []
    assert len(operations(site)) == 1000
    assert len(batches(site)) <= 40
    assert overlaps(operations(site)) == []
    assert {entry.method for entry in operations(site)} == {"PATCH"}
    assert {entry.if_match for entry in operations(site)} == {"*"}


async def test_a_backlog_goes_whatever_the_server_believes(site: Site) -> None:
    """
    Statistics from a moment when the tables were empty, or not yet committed, make nothing slow:
    no statement compares everything with everything until the database is given up.
    """
    mentors = await site.world.mentors(2000)
    site.link(mentors)
    await site.run("expire")
    await site.world.execute(BELIEVED_EMPTY)

    drained = await site.run("drain", "--json")

    assert (drained.code, drained.document["delivered"]) == (0, 2000), drained
    assert await site.wrongs() == []


async def test_one_record_that_is_missing_fails_alone(site: Site) -> None:
    """
    Its neighbours in the batch are delivered.
    """
    mentors = await site.world.mentors(30)
    site.link(mentors[1:])
    await site.run("expire")

    drained = await site.run("drain", "--json")

    assert (drained.code, drained.document["delivered"], drained.document["dead"]) == (3, 29, 1)
    failure = await site.world.row("SELECT mentor_id, error_code FROM dynamics_sync_failures")
    assert (failure.mentor_id, failure.error_code) == (mentors[0].id, "record_not_found")
    assert await site.wrongs() == []


async def test_one_value_that_fails_for_a_moment_is_tried_again_alone(site: Site) -> None:
    """
    The others are not sent a second time.
    """
    mentors = await site.world.mentors(20)
    site.link(mentors)
    site.sandbox.order(Status(status=503, key=str(mentors[7].dynamics_id)))
    await site.run("expire")

    assert (await site.run("drain")).code == 0

    assert await site.wrongs() == []
    assert len(operations(site)) == 21


async def test_a_batch_that_is_refused_as_such_goes_in_halves(site: Site) -> None:
    """
    Whatever Dynamics has against it, no mentor is given up for it.
    """
    mentors = await site.world.mentors(40)
    site.link(mentors)
    site.sandbox.order(Status(status=413, target="data"))
    site.sandbox.order(Status(status=400, target="data"))
    await site.run("expire")

    drained = await site.run("drain", "--json")

    assert (drained.code, drained.document["delivered"]) == (0, 40)
    assert await site.wrongs() == []
    assert len(batches(site)) >= 4


async def test_a_throttled_batch_closes_the_gate_and_burns_nothing(site: Site) -> None:
    """
    The whole batch waits, as one value would.
    """
    mentors = await site.world.mentors(20)
    site.link(mentors)
    site.sandbox.order(Status(status=429, retry_after="600", target="data"))
    await site.run("expire")

    drained = await site.run("drain", "--json")

    assert (drained.code, drained.document["ended"]) == (75, "gate")
    attempts = await site.world.rows("SELECT DISTINCT attempts FROM outbox.events")
    assert [row.attempts for row in attempts] == [0]
    assert len(site.requests()) == 1


async def test_a_batch_without_an_answer_is_smaller_the_next_time(site: Site) -> None:
    """
    Dynamics carries a batch out one by one, so a large one may outlast the deadline.
    """
    mentors = await site.world.mentors(40)
    site.link(mentors)
    site.sandbox.order(Hang(target="data"))
    await site.run("expire")

    drained = await site.run("drain", "--json", HLF_SYNC_REQUEST_SECONDS="1")

    assert drained.document["retry"] == 40
    await site.start_worker()
    await site.confirmed()
    assert await site.wrongs() == []
    assert "batch.smaller" in drained.stderr


async def test_a_newer_state_in_a_batch_wins(site: Site) -> None:
    """
    Expired, renewed while the batch is under way: the last word is the newer one's.
    """
    mentors = await site.world.mentors(30)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=0.2)
    await site.run("expire")
    await site.start_worker()
    await site.sandbox.ledger.wait_for(lambda entry: entry.kind == "batch")

    for mentor in mentors:
        await site.world.certifications.renew(mentor.certification_id, NEXT_YEAR)
    await site.confirmed()

    assert [site.shows(mentor) for mentor in mentors] == [True] * len(mentors)
    assert overlaps(operations(site)) == []

"""
The acceptance criteria, one test each, on real processes, a real PostgreSQL and real sockets.
"""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from tenacity import wait_exponential

import outbox
from outbox import RetryPolicy, TransientError
from tests.acceptance.site import NEXT_YEAR, SECRET
from tests.conftest import ROOT, until
from worker.certifications import DynamicsSyncException
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, Status, reads
from worker.portal import DYNAMICS_POLICY

if TYPE_CHECKING:
    from tests.acceptance.site import Site


async def test_expiry_reaches_dynamics_as_false_and_a_valid_renewal_as_true(site: Site) -> None:
    """
    On expiry the portal hides the mentor, on renewal it shows the mentor again.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.start_worker()

    assert (await site.run("expire")).code == 0
    await site.confirmed(mentor)
    assert site.shows(mentor) is False

    renewed = await site.run(
        "renew", str(mentor.certification_id), "--until", str(NEXT_YEAR), "--wait", "15"
    )
    assert renewed.code == 0
    assert "The portal has confirmed." in renewed.stdout
    assert site.shows(mentor) is True
    assert [request.body for request in site.requests(mentor)] == [
        {"hlf_portalvisible": False},
        {"hlf_portalvisible": True},
    ]


def test_the_mobile_client_never_holds_dynamics_credentials() -> None:
    """
    Secrets are read by the credentials module alone, and only the composition root has it.
    """
    reading = re.compile(r"CLIENT_SECRET|os\.environ|getenv")
    importing = re.compile(
        r"^\s*(from worker import .*\bcredentials|import worker\.credentials)"
        r"|from worker\.credentials",
        re.MULTILINE,
    )
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in ("outbox", "worker")
        for path in Path(ROOT / package).rglob("*.py")
    }
    # The demo invents a secret for its own sandbox, and hands its environment to processes.
    pretenders = {"worker/demo.py", "worker/cli/trying.py"}
    secret_readers = {
        name
        for name, source in sources.items()
        if reading.search(source) and "sandbox" not in name and name not in pretenders
    }
    assert secret_readers == {"worker/credentials.py"}
    assert {name for name, source in sources.items() if importing.search(source)} == {
        "worker/bootstrap.py"
    }


async def test_three_retries_one_two_and_four_seconds_apart_within_fifteen_seconds(
    site: Site,
) -> None:
    """
    A failing mentor is tried four times on schedule; others are delivered meanwhile.
    """
    failing, fine = await site.world.mentor(), await site.world.mentor()
    site.link([failing, fine])
    site.sandbox.order(Status(status=500, times=None, target="data", key=str(failing.dynamics_id)))
    await site.run("expire")
    await site.start_worker()

    await site.confirmed(fine, seconds=10)  # nobody else waits for the failing one
    await until(lambda: len(site.requests(failing)) == 4, seconds=25)

    starts = sorted(request.started_at for request in site.requests(failing))
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    for gap, wanted in zip(gaps, (1.0, 2.0, 4.0), strict=True):
        assert wanted <= gap < wanted + 1.5  # the claim, and a noisy machine
    assert starts[-1] - starts[0] < 15

    async def dead() -> bool:
        return bool(
            await site.world.value("SELECT count(*) FROM outbox.settled WHERE outcome = 'dead'")
        )

    await until(dead)


async def test_exhaustion_leaves_a_failure_row_with_what_the_coordinator_needs(
    site: Site,
) -> None:
    """
    After the last retry there is one open row with mentor, certification, time, code, count.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    site.sandbox.order(Status(status=500, times=4, target="data"))
    await site.run("expire")
    before = await site.world.value("SELECT clock_timestamp()")

    drained = await site.run("drain", "--json", seconds=30)

    failure = await site.world.row("SELECT * FROM public.dynamics_sync_failures")
    assert failure.mentor_id == mentor.id
    assert failure.certification_id == mentor.certification_id
    assert failure.attempted_at > before
    assert failure.error_code == "server_error"
    assert failure.retry_count == 3
    assert failure.resolved_at is None
    assert drained.document["dead"] == 1
    assert len(site.requests(mentor)) == 4


async def test_certification_and_auto_pause_stand_when_dynamics_fails(site: Site) -> None:
    """
    Local state is never rolled back because Dynamics failed.
    """
    mentor = await site.world.mentor()  # without a row in Dynamics: it fails for good
    await site.run("expire")
    await site.run("drain")

    assert await site.world.value("SELECT count(*) FROM public.dynamics_sync_failures") == 1
    assert await site.world.value("SELECT status FROM public.certifications") == "expired"
    pause = await site.world.row("SELECT * FROM public.mentor_pauses")
    assert (pause.mentor_id, pause.resumed_at) == (mentor.id, None)


async def test_the_caller_learns_that_the_update_is_pending_and_the_renewal_stands(
    site: Site,
) -> None:
    """
    `DynamicsSyncException` is a warning for the app; the command says the same.
    """
    mentor = await site.world.mentor()
    site.link([mentor], visible=False)
    await site.world.certifications.expire(mentor.certification_id)

    with pytest.raises(
        DynamicsSyncException, match=r"^Portal visibility update pending$"
    ) as caught:
        await site.world.certifications.renew(mentor.certification_id, NEXT_YEAR, wait_seconds=0.2)

    assert (caught.value.mentor_id, caught.value.state) == (mentor.id, "pending")
    certification = await site.world.row("SELECT * FROM public.certifications")
    assert (certification.status, certification.expires_on) == ("valid", NEXT_YEAR)

    again = await site.run(
        "renew", str(mentor.certification_id), "--until", str(NEXT_YEAR), "--wait", "0.2"
    )
    assert again.code == 75
    assert "Portal visibility update pending" in again.stdout


async def test_a_later_success_resolves_the_mentors_open_failures(site: Site) -> None:
    """
    The failure of the expiry closes by itself when the renewal gets through.
    """
    mentor = await site.world.mentor()
    await site.run("expire")
    await site.run("drain")
    assert (await site.run("failures")).code == 3

    site.link([mentor])
    await site.run("renew", str(mentor.certification_id), "--until", str(NEXT_YEAR))
    assert (await site.run("drain")).code == 0

    failure = await site.world.row("SELECT * FROM public.dynamics_sync_failures")
    assert failure.resolved_at is not None
    assert failure.resolution == "superseded"
    assert (await site.run("failures")).code == 0


async def test_another_organisations_mentor_never_causes_a_call(site: Site) -> None:
    """
    The skip is silent to the caller and counted; certification and pause change all the same.
    """
    theirs = await site.world.mentor(organization_id=site.world.other)
    site.link([theirs])

    expired = await site.run("expire", "--json")
    renewed = await site.run(
        "renew", str(theirs.certification_id), "--until", str(NEXT_YEAR), "--wait", "5", "--json"
    )
    # Even an event that slipped through is skipped, not sent.
    await site.world.execute(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " VALUES ('dynamics', :key, :hlf, 9, '{\"visible\": false}')",
        key=str(theirs.id),
        hlf=site.world.hlf,
    )
    drained = await site.run("drain", "--json")

    assert expired.document == {"certifications": 1, "mentors": 1, "skipped": 1}
    assert (renewed.code, renewed.document["warning"]) == (0, None)
    assert (drained.code, drained.document["skipped"]) == (0, 1)
    assert site.requests() == []
    assert site.shows(theirs) is True


async def test_credentials_are_never_sent_for_another_and_tokens_are_renewed_in_time(
    site: Site,
) -> None:
    """
    A refused or expiring token is replaced, by this organisation's credentials alone.
    """
    first, second, third = [await site.world.mentor() for _ in range(3)]
    site.link([first, second, third])
    site.sandbox.register(
        {"tenant": "another.example", "client_id": "another", "client_secret": "not ours"}
    )
    await site.start_worker()

    await site.world.certifications.expire(first.certification_id)
    await site.confirmed(first)
    site.sandbox.revoke()  # the next request meets a 401
    await site.world.certifications.expire(second.certification_id)
    await site.confirmed(second)
    site.sandbox.adjust(token_seconds=1)
    site.sandbox.revoke()
    await site.world.certifications.expire(third.certification_id)
    await site.confirmed(third)

    tokens = [entry for entry in site.sandbox.ledger.entries if entry.kind == "token"]
    assert len(tokens) == 3  # one at first, one after each refusal: never one per request
    assert {entry.client_id for entry in tokens} == {DEFAULT_CLIENT_ID}
    assert [request.status for request in site.requests(second)] == [401, 204]
    assert await site.world.rows("SELECT * FROM public.dynamics_sync_failures") == []


async def test_only_the_visibility_field_is_written_and_nothing_is_read(site: Site) -> None:
    """
    Whatever happens, Dynamics sees PATCHes of one column and no request for data.
    """
    mentors = [await site.world.mentor() for _ in range(6)]
    site.link(mentors[:5])
    site.sandbox.order(Status(status=503, times=2, target="data"))
    await site.run("expire")
    await site.run("drain")
    await site.run("retry", "--all")
    await site.run("doctor")
    await site.run("resync")
    await site.run("drain")

    assert reads(site.sandbox.ledger.entries) == []
    assert len(site.requests()) >= 12
    for request in site.requests():
        assert (request.method, request.if_match) == ("PATCH", "*")
        assert request.body == {"hlf_portalvisible": False}
    assert not any(entry.created for entry in site.sandbox.ledger.entries)


async def test_a_manual_retry_from_the_failure_list_makes_it_right(site: Site) -> None:
    """
    What the list shows can be retried by its id, and is in order afterwards.
    """
    mentor = await site.world.mentor()
    await site.run("expire")
    await site.run("drain")
    [failure] = (await site.run("failures", "--json")).document["failures"]
    assert failure["consequence"] == "may still be visible"
    site.link([mentor])

    retried = await site.run("retry", failure["id"], "--json")
    assert retried.document == {"started": 1, "under_way": 0, "resolved": 0, "gone": 0}
    assert (await site.run("drain")).code == 0

    assert site.shows(mentor) is False
    [resolved] = (await site.run("failures", "--all", "--json")).document["failures"]
    assert resolved["resolution"] == "delivered"


async def test_the_retry_policy_is_configurable_and_serves_another_destination(
    site: Site,
) -> None:
    """
    An invented accounting system, with attempts, backoff and window of its own, in-process
    and on the durable schedule.
    """
    policy = RetryPolicy(
        max_attempts=6, wait=wait_exponential(multiplier=1 / 64, exp_base=3), window_seconds=20
    )
    assert [DYNAMICS_POLICY.delay_after(attempt) for attempt in (1, 2, 3)] == [1, 2, 4]
    assert [policy.delay_after(attempt) for attempt in (1, 2, 3)] == [
        1 / 64,
        3 / 64,
        9 / 64,
    ]

    posted = 0

    async def post() -> str:
        nonlocal posted
        posted += 1
        if posted < 6:
            raise TransientError("busy", "The accounts are being closed.")
        return "posted"

    assert await policy.retrying()(post) == "posted"

    attempts: list[int] = []

    async def deliver(event: outbox.Event, _seconds: float) -> outbox.Delivered:
        attempts.append(event.attempts)
        if event.attempts < 6:
            raise TransientError("busy", "The accounts are being closed.")
        return outbox.Delivered()

    async def nothing(*_: Any) -> int:  # noqa: ANN401 (record and redrive have nothing to do)
        return 0

    organization_id = uuid4()
    async with site.world.engine.begin() as connection:
        await outbox.enqueue(
            connection,
            [
                outbox.NewEvent(
                    destination="accounts",
                    key="invoice 1",
                    organization_id=organization_id,
                    version=1,
                    payload={"paid": True},
                )
            ],
        )
    relay = outbox.Relay(
        site.world.engine,
        outbox.Destination(
            name="accounts",
            organization_id=organization_id,
            deliver=deliver,
            record=nothing,  # type: ignore[arg-type]
            redrive=nothing,
            policy=policy,
        ),
    )
    drained = await relay.drain()
    assert attempts == [1, 2, 3, 4, 5, 6]
    assert drained.tally["delivered"] == 1


async def test_waiting_between_retries_blocks_no_event_loop(site: Site) -> None:
    """
    While one call waits for its retry, the same loop goes on with other work.
    """
    policy = RetryPolicy(max_attempts=2, wait=wait_exponential(multiplier=0.3), window_seconds=5)
    failed, ticks = asyncio.Event(), 0

    async def call() -> None:
        if not failed.is_set():
            failed.set()
            raise TransientError("busy", "Later.")

    async def tick() -> None:
        nonlocal ticks
        await failed.wait()
        while ticks < 50:
            ticks += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        retried: asyncio.Task[None] = group.create_task(policy.retrying()(call))
        await tick()
        assert not retried.done()
    assert ticks == 50


async def test_transient_faults_of_a_local_endpoint_are_handled_request_by_request(
    site: Site,
) -> None:
    """
    An outage, a busy answer, a lost reply and a redirect: each request is as specified.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    for fault in (
        {"what": "status", "status": 503, "target": "data"},
        {"what": "reset_after", "target": "data"},
        {"what": "html", "target": "data"},
    ):
        site.sandbox.order(fault)
    await site.run("expire")

    drained = await site.run("drain", "--json")

    assert drained.code == 0
    requests = sorted(site.requests(mentor), key=lambda request: request.started_at)
    assert [request.status for request in requests] == [503, None, 200, 204]
    assert len({request.correlation_id for request in requests}) == 1
    assert len({request.client_request_id for request in requests}) == 4
    assert site.shows(mentor) is False
    outcomes = await site.world.rows("SELECT outcome, attempts FROM outbox.settled")
    assert [tuple(outcome) for outcome in outcomes] == [("delivered", 4)]
    assert SECRET not in drained.stdout + drained.stderr

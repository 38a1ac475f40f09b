"""
At home on Supabase: who sees what through its API, and each login of ours doing its job.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.exc import ProgrammingError

from outbox import Delivered, Destination, Relay
from outbox.errors import PermanentError
from tests.acceptance.site import NEXT_YEAR, open_site
from tests.chaos.server import free_port
from tests.conftest import wakeups_told
from tests.desk import Desk
from tests.factories import World
from tests.integration.test_callers import coordinator
from tests.openid import site_with_login
from tests.realtime import listening
from tests.receiver import SECRET, receiving
from tests.supabase import BY_DEFAULT, Platform, Project, Variant, platform
from worker import database
from worker.certifications import confirmations
from worker.coordinator import callers, retry
from worker.coordinator.app import tidy
from worker.doctor import grants
from worker.doctor.exposure import examine_exposure
from worker.doctor.rights import ROLES
from worker.portal import DYNAMICS_POLICY
from worker.tables import metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.acceptance.site import Site

TABLES = [str(table) for table in metadata.sorted_tables]
MACHINERY = [name for name in TABLES if name.startswith("outbox.")]


@pytest.fixture(scope="module")
def supabase(server_url: str) -> Iterator[Platform]:
    """
    The server.
    """
    with platform(server_url) as one:
        yield one


@pytest.fixture(scope="module")
def projects(supabase: Platform) -> Iterator[Callable[[Variant], Project]]:
    """
    A database for each variant, made when it is first asked for.
    """
    made: dict[Variant, Project] = {}
    with ExitStack() as stack:

        def of(variant: Variant) -> Project:
            if variant not in made:
                made[variant] = stack.enter_context(supabase.project(variant))
            return made[variant]

        yield of


@pytest.fixture(params=BY_DEFAULT)
def project(projects: Callable[[Variant], Project], request: pytest.FixtureRequest) -> Project:
    """
    Each variant in its turn.
    """
    return projects(request.param)


@pytest.fixture
def generous(projects: Callable[[Variant], Project]) -> Project:
    """
    The variant where more could go wrong.
    """
    return projects("grants by default")


@pytest.fixture
async def people(project: Project) -> AsyncIterator[World]:
    """
    Both organisations, in a database without other rows.
    """
    async with _world(project) as world:
        yield world


@pytest.fixture
async def site(generous: Project) -> AsyncIterator[Site]:
    """
    An installation, as `postgres` unless a command is given another address.
    """
    async with _world(generous) as world, open_site(world, generous.url) as site:
        yield site


@asynccontextmanager
async def _world(project: Project) -> AsyncIterator[World]:
    """
    Both organisations on a project that has no other rows.
    """
    with psycopg.connect(project.url) as connection:
        for table in reversed(TABLES):
            connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(*table.split("."))))
    engine = database.connect(project.url, application_name="test")
    world = World(engine)
    await world.settle_in()
    yield world
    await wakeups_told()
    await engine.dispose()


# --------------------------------------------------------------------------- the project


def test_a_user_who_may_not_make_roles_is_told_the_statements(supabase: Platform) -> None:
    """
    All of them, for an administrator to paste; and nothing is left behind.
    """
    if supabase.refusal is None:
        pytest.skip("A hosted server may have the roles already.")
    sentence, left = supabase.refusal
    for role in ROLES:
        assert f"CREATE ROLE {role} NOLOGIN" in sentence
    assert "GRANT authenticated TO hlf_sync_web" in sentence
    assert "outbox" not in left


async def test_the_doctor_finds_nothing_to_mend(project: Project) -> None:
    """
    As `postgres`, whatever was granted by default.
    """
    engine = database.connect(project.url, application_name="test")
    findings = [await grants.of_this_user(engine), await grants.of_the_roles(engine)]
    findings += [finding async for finding in examine_exposure(engine)]
    await engine.dispose()

    assert {one.about: one.says for one in findings if one.verdict != "ok"} == {}
    assert [one.about for one in findings] == [
        *("grants", "roles", "row security", "API", "certifications", "Realtime")
    ]


# ------------------------------------------------------------------------------- the API


def refused(connection: psycopg.Connection, statement: str) -> bool:
    """
    Whether a statement is not even allowed, whatever rows there are.
    """
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement.encode())
    except InsufficientPrivilege:
        return True
    return False


@pytest.mark.parametrize("role", ["anon", "service_role"])
def test_whoever_is_not_logged_in_reads_nothing_and_no_key_opens_the_machinery(
    project: Project, role: str
) -> None:
    """
    No table of ours without a login; the outbox not even with the key that sees past policies.
    """
    closed = MACHINERY if role == "service_role" else TABLES
    with project.request(role) as connection:
        open_ = [name for name in closed if not refused(connection, f"SELECT FROM {name}")]

    assert open_ == []


def mentor_claims() -> str:
    """
    Of somebody who is logged in, and has no role of ours.
    """
    return json.dumps({"sub": str(uuid4()), "role": "authenticated", "app_metadata": {}})


async def test_a_token_without_a_role_of_ours_sees_no_row(people: World, project: Project) -> None:
    """
    A mentor who is logged in to the app reads no mentor, and a request without claims neither.
    """
    await Desk(people).failing()
    for claims in ("", mentor_claims()):
        with project.request("authenticated", claims) as connection:
            rows = {
                name: connection.execute(
                    sql.SQL("SELECT FROM {}").format(sql.Identifier(*name.split(".")))
                ).fetchall()
                for name in TABLES
                if not refused(connection, f"SELECT FROM {name}")
            }
        assert "public.dynamics_sync_failures" in rows
        assert {name: found for name, found in rows.items() if found} == {}


WRITES = (
    "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual'",
    "UPDATE public.certifications SET status = 'valid'",
    "UPDATE public.portal_visibility SET visible = true",
    "UPDATE outbox.events SET version = version + 1",
    "DELETE FROM public.dynamics_sync_failures",
    "DELETE FROM outbox.audit",
    "INSERT INTO public.mentors (organization_id, full_name) VALUES (gen_random_uuid(), '')",
    "INSERT INTO outbox.commits (id) VALUES (gen_random_uuid())",
)


async def test_a_coordinator_sees_the_own_organisation_s_failures_and_writes_nothing(
    people: World, project: Project
) -> None:
    """
    Through the API, which cannot begin a transition: everything else goes through the service.
    """
    desk = Desk(people)
    _, failure_id = await desk.failing()
    stranger = await desk.wanted(organization_id=people.other)
    theirs = await desk.failed(stranger, organization_id=people.other)

    for organization_id, own in ((people.hlf, failure_id), (people.other, theirs)):
        with project.request("authenticated", coordinator(organization_id).claims()) as asking:
            seen = asking.execute("SELECT id FROM public.dynamics_sync_failures").fetchall()
            assert seen == [(own,)]
            # A project's own policies ask for the same claims.
            [subject] = asking.execute("SELECT auth.jwt() ->> 'sub'").fetchone() or [None]
            assert subject == coordinator(organization_id).subject
            for statement in WRITES:
                if not refused(asking, statement):
                    assert asking.execute(statement.encode()).rowcount == 0, statement


# ---------------------------------------------------------------------------- the logins


async def test_a_producer_renews_and_expires(site: Site, generous: Project) -> None:
    """
    The commands themselves, as a login that has this role alone.
    """
    url = generous.logins["hlf_sync_producer"]
    mentor, expiring = await site.world.mentor(), await site.world.mentor()

    renewed = await site.run(
        *("renew", str(mentor.certification_id), "--until", str(NEXT_YEAR), "--wait", "0.1"),
        DATABASE_URL=url,
    )
    expired = await site.run("expire", DATABASE_URL=url)

    assert (renewed.code, expired.code) == (75, 0), renewed.stderr + expired.stderr
    rows = await site.world.rows("SELECT key, payload ->> 'visible' AS visible FROM outbox.events")
    assert {row.key: row.visible for row in rows} == {
        str(expiring.id): "false",
        str(mentor.id): "true",
    }


async def test_a_worker_delivers_gives_up_and_forgets(site: Site, generous: Project) -> None:
    """
    `worker`, then `drain`: a delivery, a failure, and history that is old enough to go. Watched,
    the worker can tell all that it tells.
    """
    url, port = generous.logins["hlf_sync_worker"], free_port()
    linked, unlinked = await site.world.mentor(), await site.world.mentor(linked=False)
    site.link([linked])
    await site.world.execute(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version, payload,"
        " outcome, attempts, created_at, settled_at) VALUES (1, 'dynamics', 'old', :hlf, 1, '{}',"
        " 'delivered', 1, now() - interval '1 year', now() - interval '1 year')",
        hlf=site.world.hlf,
    )
    async for _ in site.world.certifications.expire_all():
        pass

    await site.start_worker(DATABASE_URL=url, HLF_METRICS_PORT=str(port))
    await site.confirmed(linked)
    async with httpx.AsyncClient() as watching:
        told = await watching.get(f"http://127.0.0.1:{port}/metrics")
    [worked] = await site.end()
    site.workers.clear()
    retried = await site.run("retry", "--all", DATABASE_URL=url)
    drained = await site.run("drain", "--json", DATABASE_URL=url)

    assert worked.code == 0, worked.stderr
    assert re.search(r"hlf_sync_database_up\{.*\} 1\.0", told.text), worked.stderr
    assert retried.code == 0, retried.stderr
    assert drained.code == 3, drained.stderr  # the one without a link needs a person
    assert "prune_failed" not in drained.stderr
    assert site.shows(linked) is False
    failed = "SELECT mentor_id FROM public.dynamics_sync_failures"
    assert await site.world.value(failed) == unlinked.id
    assert await site.world.rows("SELECT FROM outbox.settled WHERE key = 'old'") == []


@pytest.mark.parametrize("role", ["hlf_sync_worker", "hlf_sync_cron"])
async def test_whoever_delivers_can_stop_it_and_go_on_and_look(
    site: Site, generous: Project, role: str
) -> None:
    """
    What a person does with a worker's login, or cron's, when something is wrong.
    """
    mentor = await site.world.mentor()
    async for _ in site.world.certifications.expire_all():
        pass
    commands = ("pause", "status", "resume", "resync", "drain")
    runs = [await site.run(one, DATABASE_URL=generous.logins[role]) for one in commands]

    # Where it ends, the mentor is not linked: that is for a person.
    assert [run.code for run in runs] == [0, 0, 0, 0, 3], [run.stderr for run in runs]
    assert "Sending was paused" in runs[1].stdout
    failed = "SELECT mentor_id FROM public.dynamics_sync_failures"
    assert await site.world.value(failed) == mentor.id


async def test_cron_does_all_that_a_night_does(site: Site, generous: Project) -> None:
    """
    What has run out, what was changed behind our back, whom to remind, and what is to be sent.
    """
    today = datetime.now(UTC).date()
    expired, changed = await site.world.mentor(), await site.world.mentor(expires_on=NEXT_YEAR)
    await site.world.mentor(expires_on=today + timedelta(days=5))
    await site.world.execute(
        "UPDATE public.certifications SET status = 'expired', expired_at = now() WHERE id = :id",
        id=changed.certification_id,
    )
    site.link([expired, changed])

    async with receiving() as receiver:
        night = await site.run(
            "nightly",
            "--json",
            DATABASE_URL=generous.logins["hlf_sync_cron"],
            HLF_REMINDER_URL=receiver.url,
            HLF_REMINDER_SECRET=SECRET,
        )

    verdicts = {part["part"]: part["verdict"] for part in night.document["parts"]}
    assert set(verdicts.values()) <= {"done", "needs_a_person"}, night.stderr
    assert len(receiver.messages) == 1
    assert (site.shows(expired), site.shows(changed)) == (False, False)
    assert await site.world.value("SELECT ok FROM outbox.nightly_runs")


async def test_the_dashboard_serves_people_as_a_login_of_its_own(generous: Project) -> None:
    """
    Somebody logs in, looks, and tries a failure again; sessions that have ended are forgotten.
    """
    async with _world(generous) as world:
        _, failure_id = await Desk(world).failing()
        engine = database.connect(generous.logins["hlf_sync_web"], application_name="test")
        await callers.require_rows_kept_apart(engine)
        own = World(engine)
        own.hlf, own.other = world.hlf, world.other
        async with site_with_login(own) as site, site.browser() as browser:
            await browser.get("/login")
            page = await browser.get("/", headers={"Accept-Language": "en"})
            token = site.provider.token()
            done = await browser.post(
                f"/api/v1/failures/{failure_id}/retry",
                headers={"Authorization": f"Bearer {token}", "Idempotency-Key": "once"},
            )
        await tidy(engine)
        with pytest.raises(ProgrammingError, match="permission denied"):
            await own.rows("SELECT full_name FROM public.mentors")
        await wakeups_told()
        await engine.dispose()

        assert page.status_code == 200
        assert "A mentor" in page.text
        assert done.status_code == 200, done.text
        assert await world.value("SELECT count(*) FROM outbox.events") == 1
        assert await world.value("SELECT count(*) FROM outbox.web_sessions") == 1


async def test_metrics_count_without_seeing_a_name(site: Site, generous: Project) -> None:
    """
    `status`, in full.
    """
    await Desk(site.world).failing()
    run = await site.run("status", "--json", DATABASE_URL=generous.logins["hlf_sync_metrics"])

    assert run.code in {0, 3}, run.stderr
    assert run.document["failed"] == 1


async def test_a_login_that_is_used_for_another_s_job_is_told_so_at_once(
    site: Site, generous: Project
) -> None:
    """
    One sentence and exit 78, which a restart does not change: no trace, and no endless trying.
    """
    url = generous.logins["hlf_sync_metrics"]
    commands = ("worker", "drain", "nightly", "failures")
    runs = await asyncio.gather(*(site.run(one, DATABASE_URL=url) for one in commands))

    for name, run in zip(commands, runs, strict=True):
        said = run.stdout + run.stderr
        assert run.code == 78, f"{name}: {said}"
        assert "The database user" in said, name
        assert "hlf-sync doctor" in said, name
        assert "Traceback" not in said, name


@pytest.mark.parametrize("role", ROLES)
async def test_the_doctor_tells_each_login_that_it_has_what_it_needs(
    generous: Project, role: str
) -> None:
    """
    By the duties of its role, not by those of others; and which role that is, for whoever was
    refused something else.
    """
    engine = database.connect(generous.logins[role], application_name="test")
    finding = await grants.of_this_user(engine)
    await engine.dispose()

    assert (finding.verdict, finding.says) == ("ok", f"this user may do all that {role} has to")


TOO_MUCH = {
    "hlf_sync_producer": [
        "SELECT claimed_by FROM outbox.events",
        "UPDATE outbox.events SET claim_token = NULL, claimed_by = NULL, claimed_version = NULL",
        "DELETE FROM outbox.events",
        "INSERT INTO outbox.settled (event_id) VALUES (1)",
        "SELECT full_name FROM public.mentors",
        "UPDATE outbox.gates SET trips = 0",
    ],
    "hlf_sync_worker": [
        "UPDATE public.certifications SET status = 'valid'",
        "UPDATE public.portal_visibility SET visible = true",
        "SELECT full_name FROM public.mentors",
        "UPDATE outbox.settled SET outcome = 'delivered'",
        "DELETE FROM public.dynamics_sync_failures",
        "SELECT claims FROM outbox.web_sessions",
    ],
    "hlf_sync_cron": [
        "SELECT full_name FROM public.mentors",
        "DELETE FROM public.certifications",
        "SELECT claims FROM outbox.web_sessions",
    ],
    "hlf_sync_web": [
        "SELECT id FROM public.mentors",
        "SELECT answer FROM outbox.idempotency",
        "SELECT id FROM outbox.events",
    ],
    "hlf_sync_metrics": [
        "SELECT full_name FROM public.mentors",
        "SELECT payload FROM outbox.events",
        "SELECT error_message FROM public.dynamics_sync_failures",
        "UPDATE outbox.gates SET trips = 0",
    ],
}


@pytest.mark.parametrize("role", TOO_MUCH)
def test_a_login_cannot_do_what_is_another_s(generous: Project, role: str) -> None:
    """
    Nor become anybody it was not given.
    """
    with psycopg.connect(generous.logins[role]) as connection:
        allowed = [one for one in TOO_MUCH[role] if not refused(connection, one)]
        becomes = [
            one
            for one in ("authenticated", "service_role", "postgres")
            if not refused(connection, f"SET LOCAL ROLE {one}")
        ]

    assert allowed == []
    assert becomes == (["authenticated"] if role == "hlf_sync_web" else [])


# ------------------------------------------------------------------------------ Realtime


async def test_the_own_coordinator_hears_of_a_failure_and_of_its_end_and_nobody_else_does(
    people: World, project: Project
) -> None:
    """
    What a worker writes, as the publication tells it, for each who has subscribed.
    """
    mentor = await people.mentor()
    async for _ in people.certifications.expire_all():
        pass
    engine = database.connect(project.logins["hlf_sync_worker"], application_name="test")
    troubles = [PermanentError("record_not_found", "No row.")]

    async def attempt(_event: object, _seconds: float) -> Delivered:
        if troubles:
            raise troubles.pop()
        return Delivered()

    async def nothing(_limit: int | None) -> int:
        return 0

    portal = Destination(
        name="dynamics",
        organization_id=people.hlf,
        deliver=attempt,
        record=confirmations.record,
        redrive=nothing,
        policy=DYNAMICS_POLICY,
    )
    with listening(project) as realtime:
        await Relay(engine, portal).drain()
        appeared = realtime.changes()
        failure_id = UUID(appeared[0].record["id"])
        subscribers = {
            "HLF's coordinator": coordinator(people.hlf).claims(),
            "another's": coordinator(people.other).claims(),
            "a mentor": mentor_claims(),
        }
        told = {who: realtime.hears(appeared[0], claims) for who, claims in subscribers.items()}
        await retry.retry(engine, [failure_id], organization_id=people.hlf, actor="someone")
        await Relay(engine, portal).drain()
        resolved = realtime.changes()
        told_again = {
            who: realtime.hears(resolved[0], claims) for who, claims in subscribers.items()
        }
        nobody = realtime.hears(resolved[0], "", role="anon")
    await engine.dispose()

    assert [(one.kind, one.table) for one in appeared + resolved] == [
        ("insert", "public.dynamics_sync_failures"),
        ("update", "public.dynamics_sync_failures"),
    ]
    assert appeared[0].record["mentor_id"] == str(mentor.id)
    assert appeared[0].record["resolved_at"] is None
    assert resolved[0].record["id"] == str(failure_id)
    assert resolved[0].record["resolution"] == "delivered"
    assert told == told_again == {"HLF's coordinator": True, "another's": False, "a mentor": False}
    assert not nobody

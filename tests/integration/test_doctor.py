"""
The doctor: each illness is found, named, and comes with its cure.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
import trustme
from alembic import command
from psycopg import sql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from outbox import gate
from tests.conftest import alembic_config, new_database
from tests.integration import edge_function
from tests.integration.roads import Credentials, settings_of_function
from tests.receiver import SECRET as REMINDER_SECRET
from tests.receiver import receiving
from worker import doctor
from worker.coordinator import alerts
from worker.dynamics import DynamicsTarget
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, DEFAULT_TENANT, Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.factories import World
    from worker.doctor import Finding

SECRET = "canary-3b7e-doctor"  # noqa: S105 (of the sandbox)
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True, kw_only=True)
class Microsoft:
    """
    A pretend Entra ID and Dynamics, and where they are.
    """

    sandbox: Sandbox
    url: str


@pytest.fixture
async def microsoft() -> AsyncIterator[Microsoft]:
    """
    Up and running, and in the best of health.
    """
    sandbox = Sandbox(
        registrations=[
            {
                "tenant": DEFAULT_TENANT,
                "client_id": DEFAULT_CLIENT_ID,
                "client_secret": SECRET,
            }
        ]
    )
    async with sandbox.serve() as running:
        yield Microsoft(sandbox=sandbox, url=running.url)


@pytest.fixture(autouse=True)
def patient(
    world: World, microsoft: Microsoft, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """
    The environment of a healthy installation; change it to make it ill.
    """
    for name, value in {
        "DATABASE_URL": database_url,
        "HLF_ORGANIZATION_ID": str(world.hlf),
        "HLF_DYNAMICS_URL": microsoft.url,
        "HLF_DYNAMICS_AUTHORITY": microsoft.url,
        "HLF_DYNAMICS_TENANT_ID": DEFAULT_TENANT,
        "HLF_DYNAMICS_CLIENT_ID": DEFAULT_CLIENT_ID,
        "HLF_DYNAMICS_CLIENT_SECRET": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


async def _examine() -> dict[str, Finding]:
    """
    The findings by what they are about; no secret in any, a cure for all that is not well.
    """
    findings = [finding async for finding in doctor.examine()]
    for finding in findings:
        assert SECRET not in repr(finding)
        assert finding.says
        assert bool(finding.cure) == (finding.verdict != "ok")
    assert len({finding.about for finding in findings}) == len(findings)
    return {finding.about: finding for finding in findings}


def _ill(findings: dict[str, Finding]) -> dict[str, str]:
    """
    What is not well, and how bad it is.
    """
    return {
        about: finding.verdict for about, finding in findings.items() if finding.verdict != "ok"
    }


async def test_a_healthy_installation_has_nothing_to_mend(
    world: World, microsoft: Microsoft
) -> None:
    """
    Everything was looked at, nothing was changed, and nothing but a token was asked for.
    """
    findings = await _examine()
    assert _ill(findings) == {}
    assert list(findings) == [
        "settings",
        "database",
        "server",
        "clock",
        "pooler",
        "wake-up",
        "grants",
        "roles",
        "row security",
        "API",
        "certifications",
        "organisation",
        "Dynamics settings",
        "Dynamics",
        "token",
        "reminders' settings",
    ]
    assert {entry.kind for entry in microsoft.sandbox.ledger.entries} == {"token"}
    assert await world.rows("SELECT 1 FROM outbox.gates") == []


async def test_a_wrong_setting_is_named_and_ends_the_examination(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    Without settings there is nothing to look at.
    """
    patient.setenv("HLF_TIMEZONE", "Oslo")
    findings = await _examine()
    assert _ill(findings) == {"settings": "broken"}
    assert "HLF_TIMEZONE" in findings["settings"].says


# ------------------------------------------------------------------------------ database


async def test_a_database_that_is_away_does_not_hide_the_state_of_dynamics(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    Unreachable is not broken, and the rest is examined all the same; no password is shown.
    """
    patient.setenv("DATABASE_URL", "postgresql://me:canary-password@127.0.0.1:9/x")
    findings = await _examine()
    assert _ill(findings) == {"database": "unreachable"}
    assert "token" in findings
    assert "canary-password" not in repr(findings)


async def test_a_database_that_goes_away_meanwhile_is_a_finding_too(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    No trace, and the examination goes on.
    """

    async def lost(*_: object, **__: object) -> None:
        raise OperationalError("SELECT", {}, Exception())

    patient.setattr(alerts, "status", lost)
    findings = [finding async for finding in doctor.examine()]
    [broken] = [finding for finding in findings if finding.verdict != "ok"]
    assert (broken.about, broken.verdict) == ("database", "unreachable")
    assert "token" in {finding.about for finding in findings}


async def test_an_address_that_is_none_is_broken(patient: pytest.MonkeyPatch) -> None:
    """
    A person has to mend it.
    """
    patient.setenv("DATABASE_URL", "nonsense")
    findings = await _examine()
    assert _ill(findings) == {"database": "broken"}
    assert "DATABASE_URL" in findings["database"].says


async def test_missing_and_old_migrations_say_what_to_run(
    patient: pytest.MonkeyPatch, server_url: str
) -> None:
    """
    No tables at all, or those of an older release.
    """
    with new_database(server_url) as url:
        patient.setenv("DATABASE_URL", url)
        findings = await _examine()
        assert _ill(findings) == {"database": "broken"}
        assert "make migrate" in findings["database"].says

        await asyncio.to_thread(command.upgrade, alembic_config(), "0001")
        findings = await _examine()
        assert _ill(findings) == {"database": "broken"}
        assert "0001" in findings["database"].says


async def test_an_old_server_is_named(patient: pytest.MonkeyPatch) -> None:
    """
    With the version that is needed.
    """
    patient.setattr(doctor.database, "OLDEST_POSTGRESQL", 99)
    findings = await _examine()
    assert _ill(findings) == {"server": "broken"}
    assert "99" in findings["server"].cure


async def test_a_clock_that_is_wrong_is_a_warning(patient: pytest.MonkeyPatch) -> None:
    """
    Nothing goes wrong for it, but logs mislead.
    """
    patient.setattr(doctor.database, "time", SimpleNamespace(time=lambda: 0.0))
    findings = await _examine()
    assert _ill(findings) == {"clock": "warning"}


@contextmanager
def _restricted_user(database_url: str, *, bypass: bool) -> Iterator[str]:
    """
    A user who may do all that is needed, and nothing else; yields the address to log in.
    """
    name, password = f"hlf_test_{uuid4().hex}", uuid4().hex
    role = sql.Identifier(name)
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE ROLE {} LOGIN {} PASSWORD {}").format(
                role, sql.SQL("BYPASSRLS" if bypass else "NOBYPASSRLS"), sql.Literal(password)
            )
        )
        for schema in ("public", "outbox"):
            admin.execute(
                sql.SQL("GRANT USAGE ON SCHEMA {schema} TO {role}").format(
                    schema=sql.Identifier(schema), role=role
                )
            )
            admin.execute(
                sql.SQL(
                    "GRANT SELECT, INSERT, UPDATE, DELETE"
                    " ON ALL TABLES IN SCHEMA {schema} TO {role}"
                ).format(schema=sql.Identifier(schema), role=role)
            )
        try:
            yield (
                make_url(database_url)
                .set(username=name, password=password)
                .render_as_string(hide_password=False)
            )
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


async def _revoke(world: World, url: str, what: str) -> None:
    await world.execute(f'REVOKE {what} FROM "{make_url(url).username}"')


async def test_each_missing_grant_is_named(
    world: World, patient: pytest.MonkeyPatch, database_url: str
) -> None:
    """
    Just those, and what cannot be looked at without them ends no examination.
    """
    with _restricted_user(database_url, bypass=True) as url:
        patient.setenv("DATABASE_URL", url)
        assert _ill(await _examine()) == {}

        await _revoke(world, url, "UPDATE ON public.certifications")
        await _revoke(world, url, "ALL ON outbox.doubts")
        await _revoke(world, url, "SELECT ON public.portal_visibility")
        findings = await _examine()

    assert _ill(findings) == {"grants": "broken"}
    assert findings["grants"].says == (
        "missing: DELETE on outbox.doubts, INSERT on outbox.doubts, SELECT on outbox.doubts,"
        " SELECT on public.portal_visibility,"
        " UPDATE (expired_at, expires_on, renewed_at, status) on public.certifications,"
        " UPDATE on outbox.doubts"
    )
    assert "token" in findings


async def test_a_schema_that_may_not_be_entered_is_said_so(
    world: World, patient: pytest.MonkeyPatch, database_url: str
) -> None:
    """
    One sentence, not a trace.
    """
    with _restricted_user(database_url, bypass=True) as url:
        patient.setenv("DATABASE_URL", url)
        await _revoke(world, url, "USAGE ON SCHEMA outbox")
        findings = await _examine()
    assert _ill(findings) == {"database": "broken"}
    assert "outbox" in findings["database"].says


async def test_rows_that_a_policy_hides_are_no_sign_of_health(
    patient: pytest.MonkeyPatch, database_url: str
) -> None:
    """
    With every grant and without a policy a user sees no row, and all would look in order.
    """
    with _restricted_user(database_url, bypass=False) as url:
        patient.setenv("DATABASE_URL", url)
        findings = await _examine()
    assert _ill(findings) == {"grants": "broken"}
    assert "row level security" in findings["grants"].says
    assert "portal_visibility" in findings["grants"].says
    assert "BYPASSRLS" in findings["grants"].cure


async def test_an_organisation_that_nobody_knows_is_found(patient: pytest.MonkeyPatch) -> None:
    """
    Every other command would just find nothing to do.
    """
    patient.setenv("HLF_ORGANIZATION_ID", str(uuid4()))
    findings = await _examine()
    assert _ill(findings) == {"organisation": "broken"}
    assert "HLF_ORGANIZATION_ID" in findings["organisation"].cure


# ------------------------------------------------------------------------------- wake-up


async def test_a_notification_that_is_not_heard_points_to_another_database(
    patient: pytest.MonkeyPatch, server_url: str
) -> None:
    """
    The connection is a session, so no pooler swallowed it.
    """
    patient.setattr(doctor.session, "HEARD_SECONDS", 0.1)
    with new_database(server_url) as elsewhere:
        patient.setenv("LISTEN_DATABASE_URL", elsewhere)
        findings = await _examine()
    assert _ill(findings) == {"wake-up": "warning"}
    assert "pooler" not in findings["wake-up"].says
    assert "LISTEN_DATABASE_URL" in findings["wake-up"].cure


async def test_a_wake_up_that_cannot_be_connected_is_not_blamed_on_a_pooler(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    The worker goes on by polling, so it is a warning.
    """
    patient.setenv("LISTEN_DATABASE_URL", "postgresql://me:canary-password@127.0.0.1:9/x")
    findings = await _examine()
    assert _ill(findings) == {"wake-up": "warning"}
    assert "pooler" not in findings["wake-up"].says
    assert "canary-password" not in repr(findings)


async def test_a_wake_up_address_that_is_none_is_broken(patient: pytest.MonkeyPatch) -> None:
    """
    The worker would not start with it.
    """
    patient.setenv("LISTEN_DATABASE_URL", "nonsense")
    findings = await _examine()
    assert _ill(findings) == {"wake-up": "broken"}
    assert "LISTEN_DATABASE_URL" in findings["wake-up"].cure


# ------------------------------------------------------------------------------- backlog


async def test_what_stands_in_the_way_is_told(world: World) -> None:
    """
    A closed gate, failures, and mentors for whom nothing is on the way: warnings with a command.
    """
    forgotten, failed = await world.mentor(), await world.mentor()
    for mentor in (forgotten, failed):
        await world.execute(
            "INSERT INTO public.portal_visibility (mentor_id, organization_id, visible)"
            " VALUES (:id, :hlf, false)",
            id=mentor.id,
            hlf=world.hlf,
        )
    await world.execute(
        "INSERT INTO public.dynamics_sync_failures (organization_id, mentor_id, visible, version,"
        " error_code, error_message, retry_count, recoverable)"
        " VALUES (:hlf, :id, false, 1, 'timeout', '', 3, false)",
        hlf=world.hlf,
        id=failed.id,
    )
    async with world.engine.begin() as connection:
        await gate.close_by_hand(
            connection,
            destination="dynamics",
            organization_id=world.hlf,
            message="Upgrade.",
            closed_by="IT",
        )

    findings = await _examine()
    assert _ill(findings) == {"gate": "warning", "failures": "warning", "portal": "warning"}
    assert "Upgrade." in findings["gate"].says
    assert "hlf-sync failures" in findings["failures"].cure
    assert "hlf-sync resync" in findings["portal"].cure


# ------------------------------------------------------------------------------ Dynamics


@asynccontextmanager
async def _through_the_function(
    patient: pytest.MonkeyPatch, world: World, microsoft: Microsoft, **told: str
) -> AsyncIterator[None]:
    """
    The patient without the credentials, which a function has now.
    """
    credentials = Credentials(authority=microsoft.url, resource=microsoft.url, secret=SECRET)
    settings = settings_of_function(DynamicsTarget(url=microsoft.url), credentials)
    settings["HLF_ORGANIZATION_ID"] = str(world.hlf)
    for name in ("AUTHORITY", "TENANT_ID", "CLIENT_ID", "CLIENT_SECRET"):
        patient.delenv(f"HLF_DYNAMICS_{name}")
    async with edge_function.running(settings | told) as function:
        patient.setenv("HLF_SYNC_TRANSPORT", "edge")
        patient.setenv("HLF_EDGE_URL", function.url)
        patient.setenv("HLF_EDGE_KEY", edge_function.KEY)
        yield


async def test_a_healthy_installation_with_the_edge_function_has_nothing_to_mend(
    patient: pytest.MonkeyPatch, world: World, microsoft: Microsoft
) -> None:
    """
    The function is asked for a token, and Dynamics for nothing.
    """
    async with _through_the_function(patient, world, microsoft):
        findings = await _examine()
    assert _ill(findings) == {}
    assert list(findings)[-4:] == [
        "Dynamics settings",
        "Edge Function",
        "token",
        "reminders' settings",
    ]
    assert {entry.kind for entry in microsoft.sandbox.ledger.entries} == {"token"}


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ({"HLF_EDGE_KEY": "another-key"}, {}, "HLF_EDGE_KEY"),
        ({"HLF_DYNAMICS_COLUMN": "hlf_other"}, {}, "HLF_DYNAMICS_*"),
        ({}, {"HLF_DYNAMICS_TENANT_ID": ""}, "HLF_DYNAMICS_TENANT_ID"),
        ({}, {"HLF_DYNAMICS_CLIENT_SECRET": "wrong"}, "secret"),
        ({}, {"HLF_ORGANIZATION_ID": str(uuid4())}, "HLF_ORGANIZATION_ID"),
    ],
    ids=["key", "target", "missing", "secret", "organisation"],
)
async def test_what_is_wrong_with_the_edge_function_is_named(
    patient: pytest.MonkeyPatch,
    world: World,
    microsoft: Microsoft,
    ours: dict[str, str],
    theirs: dict[str, str],
    says: str,
) -> None:
    """
    On our side or on its own.
    """
    async with _through_the_function(patient, world, microsoft, **theirs):
        for name, value in ours.items():
            patient.setenv(name, value)
        findings = await _examine()
    assert _ill(findings) == {"token": "broken"}
    assert says in findings["token"].says


async def test_an_edge_function_that_nobody_serves_is_unreachable(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    With its own setting to check; a missing one is named before.
    """
    patient.setenv("HLF_SYNC_TRANSPORT", "edge")
    findings = await _examine()
    assert _ill(findings) == {"Dynamics settings": "broken"}
    assert "HLF_EDGE_URL" in findings["Dynamics settings"].says

    patient.setenv("HLF_EDGE_URL", f"{NOWHERE}/hlf-dynamics-sync")
    patient.setenv("HLF_EDGE_KEY", "a-key")
    findings = await _examine()
    assert _ill(findings) == {"Edge Function": "unreachable", "token": "unreachable"}
    assert "HLF_EDGE_URL" in findings["Edge Function"].cure


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HLF_DYNAMICS_URL", ""),
        ("HLF_DYNAMICS_URL", "http://crm.example"),
        ("HLF_DYNAMICS_CLIENT_SECRET", ""),
        ("HLF_DYNAMICS_TENANT_ID", "../other"),
    ],
)
async def test_a_wrong_setting_of_dynamics_is_broken(
    patient: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """
    Found before anything is sent anywhere.
    """
    patient.setenv(name, value)
    assert _ill(await _examine()) == {"Dynamics settings": "broken"}


async def test_an_unreachable_dynamics_and_an_unreachable_authority_are_told_apart(
    patient: pytest.MonkeyPatch, microsoft: Microsoft
) -> None:
    """
    Each with its own setting to check.
    """
    patient.setenv("HLF_DYNAMICS_URL", NOWHERE)
    findings = await _examine()
    assert findings["Dynamics"].verdict == "unreachable"
    assert "HLF_DYNAMICS_URL" in findings["Dynamics"].cure

    patient.setenv("HLF_DYNAMICS_URL", microsoft.url)
    patient.setenv("HLF_DYNAMICS_AUTHORITY", NOWHERE)
    findings = await _examine()
    assert _ill(findings) == {"token": "unreachable"}
    assert "HLF_DYNAMICS_AUTHORITY" in findings["token"].cure


async def test_a_dynamics_that_takes_the_connection_and_hangs_does_not_hold_the_doctor(
    patient: pytest.MonkeyPatch,
) -> None:
    """
    A TLS handshake that never ends is "does not answer".
    """
    patient.setattr(doctor.dynamics, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        patient.setenv("HLF_DYNAMICS_URL", f"https://127.0.0.1:{silent.getsockname()[1]}")
        async with asyncio.timeout(20):
            findings = await _examine()
    assert findings["Dynamics"].verdict == "unreachable"


@asynccontextmanager
async def _untrusted_server() -> AsyncIterator[int]:
    """
    TLS by an authority that nobody trusts; yields the port.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_certificate_that_is_not_trusted_is_broken(patient: pytest.MonkeyPatch) -> None:
    """
    Waiting would not help.
    """
    async with _untrusted_server() as port:
        patient.setenv("HLF_DYNAMICS_URL", f"https://127.0.0.1:{port}")
        findings = await _examine()
    assert findings["Dynamics"].verdict == "broken"
    assert "certificate" in findings["Dynamics"].says


async def test_a_secret_that_is_refused_is_broken(patient: pytest.MonkeyPatch) -> None:
    """
    Dynamics itself is fine, and is said to be.
    """
    patient.setenv("HLF_DYNAMICS_CLIENT_SECRET", "wrong")
    findings = await _examine()
    assert _ill(findings) == {"token": "broken"}
    assert "secret" in findings["token"].cure


# ----------------------------------------------------------------------------- reminders


async def test_a_webhook_that_can_be_reached_is_well(patient: pytest.MonkeyPatch) -> None:
    """
    Without sending anything, and without showing its path.
    """
    async with receiving() as receiver:
        patient.setenv("HLF_REMINDER_URL", receiver.url)
        patient.setenv("HLF_REMINDER_SECRET", REMINDER_SECRET)
        findings = await _examine()

    assert _ill(findings) == {}
    assert findings["webhook"].says.endswith("can be reached")
    assert "hooks" not in repr(findings)
    assert "60, 30, 7 days" in findings["reminders' settings"].says
    assert receiver.messages == []


@pytest.mark.parametrize(
    ("url", "secret", "ill"),
    [
        (f"{NOWHERE}/canary-path", REMINDER_SECRET, {"webhook": "unreachable"}),
        ("http://hooks.example", REMINDER_SECRET, {"reminders' settings": "broken"}),
        (NOWHERE, "", {"reminders' settings": "broken"}),
        (NOWHERE, "canary-no-base64", {"reminders' settings": "broken"}),
    ],
)
async def test_what_is_wrong_with_the_webhook_is_named(
    patient: pytest.MonkeyPatch, url: str, secret: str, ill: dict[str, str]
) -> None:
    """
    Address, secret or network; neither path nor secret is repeated.
    """
    patient.setenv("HLF_REMINDER_URL", url)
    patient.setenv("HLF_REMINDER_SECRET", secret)
    findings = await _examine()

    assert _ill(findings) == ill
    assert "canary" not in repr(findings)
    assert any("HLF_REMINDER" in finding.says + finding.cure for finding in findings.values())

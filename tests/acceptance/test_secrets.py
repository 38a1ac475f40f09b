"""
No secret gets out: not on a screen, not into a log, not into a row, whatever goes wrong.

What a command prints and what a test leaves in the database is searched for secrets in every test
(see `tests.canaries`); here are the ways in which one could get there.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trustme
from sqlalchemy.engine import make_url

from tests.acceptance.site import NEXT_YEAR
from tests.conftest import until
from worker.dynamics.sandbox import Garbage, Redirect, ResetAfter, Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from tests.acceptance.site import Run, Site

WRONG_SECRET = "canary-5d20-wrong-secret"  # noqa: S105 (nobody's)
PASSWORD = "canary-71aa-database-password"  # noqa: S105 (of no database)
NOWHERE = "http://127.0.0.1:9"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("drain",),
    ("status", "--json"),
    ("failures", "--all"),
    ("retry", "--all"),
    ("doctor",),
)


@pytest.fixture
async def site(site: Site) -> Site:
    """
    With mentors to tell Dynamics about, one of whom it does not know.
    """
    mentors = await site.world.mentors(3)
    site.link(mentors[:2])
    await site.world.certifications.expire(mentors[0].certification_id)
    await site.world.certifications.expire(mentors[2].certification_id)
    return site


def _leave_no_trace(runs: Sequence[Run]) -> None:
    """
    No trace in anything that was printed.
    """
    for run in runs:
        assert "Traceback" not in run.stdout + run.stderr


async def _delivers(site: Site) -> bool:
    return bool(await site.world.value("SELECT count(*) FROM public.portal_confirmations"))


async def _all_commands(site: Site) -> list[Run]:
    return [await site.run(*arguments) for arguments in COMMANDS]


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_when_all_goes_well_nothing_is_shown(site: Site, log_format: str) -> None:
    """
    Deliveries, a failure, its retry and a renewal.
    """
    site.environment["HLF_LOG_FORMAT"] = log_format
    runs = await _all_commands(site)
    certification = await site.world.value("SELECT id FROM public.certifications LIMIT 1")
    runs.append(await site.run("renew", str(certification), "--until", str(NEXT_YEAR)))
    _leave_no_trace(runs)
    assert [entry.kind for entry in site.sandbox.ledger.entries].count("token") >= 2


async def test_a_wrong_secret_is_not_repeated(site: Site) -> None:
    """
    Entra ID refuses it; the gate, the failures and the doctor say so without it.
    """
    site.environment["HLF_DYNAMICS_CLIENT_SECRET"] = WRONG_SECRET
    runs = await _all_commands(site)
    _leave_no_trace(runs)
    assert runs[0].code == 78


@pytest.mark.parametrize(
    "fault",
    [
        Status(status=401, times=None, target="data"),
        Status(status=403, times=None, target="data"),
        Status(status=500, times=1, target="data"),
        Status(status=500, times=1, target="token"),
        Redirect(times=None, target="data", location="https://elsewhere.example/"),
        Garbage(times=1, target="data"),
        ResetAfter(times=1, target="token"),
    ],
    ids=lambda fault: f"{type(fault).__name__}-{fault.target}-{getattr(fault, 'status', '')}",
)
async def test_what_dynamics_answers_brings_no_token_to_light(site: Site, fault: Status) -> None:
    """
    Refusals, redirects, garbage and broken connections, with a token in each request.
    """
    site.sandbox.order(fault)
    runs = [
        await site.run("drain", HLF_LOG_FORMAT="json"),
        await site.run("failures", "--json"),
    ]
    _leave_no_trace(runs)


@pytest.mark.parametrize("setting", ["HLF_DYNAMICS_URL", "HLF_DYNAMICS_AUTHORITY"])
@pytest.mark.parametrize("address", [NOWHERE, f"https://me:{PASSWORD}@crm.example", "https://[::1"])
async def test_an_address_that_cannot_be_used_brings_nothing_to_light(
    site: Site, setting: str, address: str
) -> None:
    """
    Nobody there, a password where none belongs, and nonsense.
    """
    site.environment[setting] = address
    _leave_no_trace([await site.run("drain"), await site.run("doctor", "--json")])


@asynccontextmanager
async def _untrusted_server() -> AsyncIterator[str]:
    """
    TLS by an authority that nobody trusts; yields its address.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("setting", ["HLF_DYNAMICS_URL", "HLF_DYNAMICS_AUTHORITY"])
async def test_a_certificate_that_is_not_trusted_gets_no_secret_and_shows_none(
    site: Site, setting: str
) -> None:
    """
    Neither for the token nor for the data.
    """
    async with _untrusted_server() as address:
        site.environment[setting] = address
        runs = [await site.run("drain"), await site.run("doctor"), await site.run("status")]
    assert [run.code for run in runs[:2]] == [78, 78]
    _leave_no_trace(runs)


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{PASSWORD}@127.0.0.1:9/x",
        f"postgresql://me:{PASSWORD}@no-such-host.invalid/x",
        f"postgresql://127.0.0.1:9/x?user=me&password={PASSWORD}",
        f"postgresql://me:{PASSWORD}@127.0.0.1:port/x",
        f"mysql://me:{PASSWORD}@127.0.0.1/x",
        f"postgresql://me:{PASSWORD}@127.0.0.1:9/x?no_such_option={PASSWORD}",
    ],
)
async def test_a_database_that_cannot_be_used_does_not_show_its_password(
    site: Site, address: str
) -> None:
    """
    Unreachable, unknown or misspelt: one sentence without the address.
    """
    for command in ("worker", "doctor"):
        run = await site.run(command, "--json", DATABASE_URL=address)
        _leave_no_trace([run])
        assert run.code in {69, 78}


async def test_a_database_that_refuses_the_password_does_not_show_it(
    site: Site, direct_url: str
) -> None:
    """
    The server's own refusal names the user at most.
    """
    address = make_url(direct_url).set(username="nobody_of_ours", password=PASSWORD)
    url = address.render_as_string(hide_password=False)
    runs = [await site.run(name, DATABASE_URL=url) for name in ("status", "doctor")]
    _leave_no_trace(runs)
    assert [run.code for run in runs] == [69, 69]


async def test_a_wake_up_that_cannot_be_connected_shows_no_password(site: Site) -> None:
    """
    The worker goes on, and its log says what failed by name only.
    """
    worker = await site.start_worker(
        LISTEN_DATABASE_URL=f"postgresql://me:{PASSWORD}@127.0.0.1:9/x", HLF_LOG_FORMAT="json"
    )

    await until(lambda: _delivers(site))
    worker.send_signal(signal.SIGTERM)
    runs = await site.end()
    assert "wakeup.connection_lost" in runs[0].stderr
    _leave_no_trace(runs)


async def test_a_worker_whose_database_breaks_off_shows_nothing(site: Site) -> None:
    """
    Connections that are cut again and again leave names of errors in the log, no more.
    """
    await site.start_worker()
    await until(lambda: _delivers(site))
    await site.world.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'hlf-sync%'"
    )
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.world.certifications.expire(mentor.certification_id)
    await site.confirmed(mentor)
    _leave_no_trace(await site.end())


async def test_a_file_that_holds_no_secret_is_named_and_not_shown(
    site: Site, tmp_path: Path
) -> None:
    """
    Missing, empty or no text.
    """
    missing, empty, binary = (tmp_path / name for name in ("missing", "empty", "binary"))
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe" + WRONG_SECRET.encode())
    for file in (missing, empty, binary):
        run = await site.run(
            "drain", HLF_DYNAMICS_CLIENT_SECRET="", HLF_DYNAMICS_CLIENT_SECRET_FILE=str(file)
        )
        assert run.code == 78
        assert "HLF_DYNAMICS_CLIENT_SECRET" in run.stderr
        _leave_no_trace([run])

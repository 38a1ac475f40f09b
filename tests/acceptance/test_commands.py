"""
The commands as their users meet them: sentences, JSON and exit codes.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
from sqlalchemy.engine import make_url

from tests.acceptance.site import NEXT_YEAR, SECRET
from tests.conftest import new_database
from tests.integration import edge_function
from tests.integration.roads import Credentials, settings_of_function
from tests.integration.test_database import turning_away
from worker.dynamics import DynamicsTarget
from worker.dynamics.sandbox import Status

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.site import Run, Site

NOWHERE = "http://127.0.0.1:9"


def _says(run: Run, code: int, *words: str) -> None:
    """
    One sentence on stderr, no trace, the right exit code, nothing secret.
    """
    assert run.code == code, run.stderr
    assert "Traceback" not in run.stderr
    sentences = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1, run.stderr
    for word in words:
        assert word in sentences[0]
    assert SECRET not in run.stdout + run.stderr


async def test_a_wrong_database_url_is_one_sentence(site: Site) -> None:
    """
    A server that is not there is 69, an address that is none is 78; no password is shown.
    """
    away = await site.run("status", DATABASE_URL="postgresql://me:hidden@127.0.0.1:9/x")
    _says(away, 69, "127.0.0.1", "DATABASE_URL")
    assert "hidden" not in away.stderr
    _says(await site.run("drain", DATABASE_URL="nonsense"), 78, "DATABASE_URL")
    _says(await site.run("worker", DATABASE_URL=""), 78, "DATABASE_URL is not set")


async def test_a_database_that_lets_nobody_in_now_is_another_sentence(
    site: Site, server_url: str, direct_url: str
) -> None:
    """
    Full, or still starting: it is 69 too, but nobody looks for a mistake in the address.
    """
    login = f"hlf_test_{secrets.token_hex(4)}"
    crowded = make_url(direct_url).set(username=login, password=login)
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {login} LOGIN PASSWORD '{login}' CONNECTION LIMIT 0".encode())
        url = crowded.render_as_string(hide_password=False)
        full = await site.run("status", DATABASE_URL=url)
        admin.execute(f"DROP ROLE {login}".encode())
    _says(full, 69, "no connection to spare", "CONNECTION LIMIT")
    assert "does not answer" not in full.stderr

    async with turning_away("57P03", "the database system is starting up") as url:
        starting = await site.run("status", DATABASE_URL=url)
    _says(starting, 69, "starting", "give it a minute")


async def test_an_unmigrated_schema_is_one_sentence(site: Site, server_url: str) -> None:
    """
    A database without our tables says what to run.
    """
    with new_database(server_url) as url:
        for command in ("status", "worker", "drain", "expire"):
            _says(await site.run(command, DATABASE_URL=url), 78, "make migrate")


async def test_a_missing_secret_is_one_sentence(site: Site) -> None:
    """
    What sends needs the secret, and says both ways to give it.
    """
    for command in ("worker", "drain"):
        run = await site.run(command, HLF_DYNAMICS_CLIENT_SECRET="")
        _says(run, 78, "HLF_DYNAMICS_CLIENT_SECRET", "_FILE")


async def test_a_secret_from_a_file_will_do(site: Site, tmp_path: Path) -> None:
    """
    The `_FILE` variable is as good as the plain one.
    """
    file = tmp_path / "client"
    file.write_text(SECRET + "\n")
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.run("expire")

    drained = await site.run(
        "drain", HLF_DYNAMICS_CLIENT_SECRET="", HLF_DYNAMICS_CLIENT_SECRET_FILE=str(file)
    )

    assert drained.code == 0
    assert site.shows(mentor) is False


async def test_a_wrong_secret_closes_the_gate_and_burns_nothing(site: Site) -> None:
    """
    Configuration is exit 78: events wait, no failure row is written.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.run("expire")

    drained = await site.run("drain", HLF_DYNAMICS_CLIENT_SECRET="wrong")

    assert drained.code == 78
    assert "resume" in drained.stdout
    event = await site.world.row("SELECT attempts FROM outbox.events")
    assert event.attempts == 0
    assert await site.world.rows("SELECT * FROM public.dynamics_sync_failures") == []
    assert (await site.run("resume")).code == 0
    assert (await site.run("drain")).code == 0
    assert site.shows(mentor) is False


async def test_through_the_edge_function_everything_arrives_without_our_having_a_secret(
    site: Site,
) -> None:
    """
    The worker has a key only; a wrong one closes the gate, and batches are refused at the start.
    """
    mentors = await site.world.mentors(3)
    site.link(mentors[:2])
    await site.run("expire")
    url = site.environment["HLF_DYNAMICS_URL"]
    credentials = Credentials(authority=url, resource=url, secret=SECRET)
    settings = settings_of_function(DynamicsTarget(url=url), credentials)
    settings["HLF_ORGANIZATION_ID"] = str(site.world.hlf)
    for name in ("AUTHORITY", "TENANT_ID", "CLIENT_ID", "CLIENT_SECRET"):
        del site.environment[f"HLF_DYNAMICS_{name}"]
    async with edge_function.running(settings) as function:
        site.environment |= {
            "HLF_SYNC_TRANSPORT": "edge",
            "HLF_EDGE_URL": function.url,
            "HLF_EDGE_KEY": edge_function.KEY,
        }
        _says(await site.run("drain", HLF_SYNC_BATCH="10"), 78, "HLF_SYNC_BATCH")
        wrong = await site.run("drain", HLF_EDGE_KEY="wrong")
        assert wrong.code == 78
        assert await site.world.rows("SELECT * FROM public.dynamics_sync_failures") == []
        assert (await site.run("resume")).code == 0

        drained = await site.run("drain")

    assert drained.code == 3
    assert [site.shows(mentor) for mentor in mentors] == [False, False, None]
    [failure] = await site.world.rows("SELECT * FROM public.dynamics_sync_failures")
    assert (failure.mentor_id, failure.error_code) == (mentors[2].id, "record_not_found")
    said = "".join([wrong.stdout, wrong.stderr, drained.stdout, drained.stderr, *function.lines])
    for canary in (SECRET, edge_function.KEY, *(str(mentor.dynamics_id) for mentor in mentors)):
        assert canary not in said


async def test_an_unreachable_dynamics_is_said_plainly_and_loses_nothing(site: Site) -> None:
    """
    Exit 69, the portal may be wrong meanwhile, and it is put right when Dynamics is back.
    """
    mentors = await site.world.mentors(6)
    site.link(mentors)
    await site.run("expire")

    drained = await site.run("drain", HLF_DYNAMICS_URL=NOWHERE)
    assert drained.code == 69
    assert "6 mentors may still be visible on the portal." in drained.stdout
    assert "Dynamics does not answer" in drained.stdout

    assert (await site.run("resume")).code == 0
    await site.start_worker()
    await site.confirmed()
    assert await site.wrongs() == []


async def test_an_unknown_certification_and_a_renewal_into_the_past_change_nothing(
    site: Site,
) -> None:
    """
    A user's mistake is exit 2 and one sentence.
    """
    mentor = await site.world.mentor()
    unknown = str(uuid4())
    _says(await site.run("renew", unknown, "--until", str(NEXT_YEAR)), 2, unknown)
    past = await site.run("renew", str(mentor.certification_id), "--until", "2020-01-01")
    _says(past, 2, "2020-01-01", "later date")
    _says(await site.run("retry", unknown), 2, unknown)
    _says(await site.run("retry"), 2, "--all")
    assert (await site.run("renew", "no-uuid", "--until", str(NEXT_YEAR))).code == 2
    assert await site.world.rows("SELECT * FROM outbox.events") == []


async def test_pause_holds_everything_back_and_resume_lets_it_go(site: Site) -> None:
    """
    While an operator has closed the gate nothing is sent, and everybody is told who and why.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.run("expire")
    assert (await site.run("pause", "--reason", "Dynamics is being upgraded")).code == 0

    drained = await site.run("drain")
    assert drained.code == 75
    assert "Dynamics is being upgraded." in drained.stdout
    assert site.requests() == []

    assert (await site.run("resume")).code == 0
    assert (await site.run("drain")).code == 0
    assert site.shows(mentor) is False


async def test_throttling_is_obeyed_by_the_next_process_too(site: Site) -> None:
    """
    A 429 closes the gate for as long as it says; `resume` does not break the promise.
    """
    mentors = await site.world.mentors(3)
    site.link(mentors)
    site.sandbox.order(Status(status=429, retry_after="120", times=None, target="data"))
    await site.run("expire")

    first = await site.run("drain", HLF_SYNC_CONCURRENCY="1")
    second = await site.run("drain")

    assert (first.code, second.code) == (75, 75)
    assert "asked us to wait" in second.stdout
    assert len(site.requests()) == 1
    assert (await site.run("resume")).code == 75
    assert await site.world.value("SELECT max(attempts) FROM outbox.events") == 0


async def test_resync_asserts_every_mentor_again(site: Site) -> None:
    """
    What somebody changed in Dynamics by hand is put right.
    """
    mentors = await site.world.mentors(5)
    site.link(mentors)
    await site.run("expire")
    await site.run("drain")
    site.link(mentors[:2], visible=True)  # by hand, in Dynamics

    assert (await site.run("resync", "--json")).document == {"mentors": 5, "enqueued": 5}
    assert (await site.run("drain")).code == 0
    assert await site.wrongs() == []


async def test_status_answers_first_and_is_stable_json(site: Site) -> None:
    """
    The first line is the answer; the document has every key a monitor may rely on.
    """
    assert (await site.run("status")).stdout.startswith("Everything is in order")
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.run("expire")

    waiting = await site.run("status")
    assert waiting.code == 0
    assert waiting.stdout.startswith("1 mentor may still be visible on the portal.")
    document = (await site.run("status", "--json")).document
    assert set(document) >= {
        "in_order",
        "waiting",
        "waiting_to_hide",
        "waiting_to_show",
        "failed",
        "failed_to_hide",
        "failed_to_show",
        "unaccounted",
        "maybe_wrongly_visible",
        "oldest_waiting_seconds",
        "gate",
    }
    assert (document["waiting_to_hide"], document["maybe_wrongly_visible"]) == (1, 1)


async def test_doctor_finds_health_and_each_illness_with_its_cure(site: Site) -> None:
    """
    Healthy is exit 0; an unreachable Dynamics 69; a wrong secret or setting 78.
    """
    healthy = await site.run("doctor", "--json")
    assert healthy.code == 0, healthy.stdout
    assert healthy.document["healthy"]
    assert {finding["verdict"] for finding in healthy.document["findings"]} == {"ok"}

    assert (await site.run("doctor", HLF_DYNAMICS_URL=NOWHERE)).code == 69
    wrong = await site.run("doctor", HLF_DYNAMICS_CLIENT_SECRET="wrong")
    assert wrong.code == 78
    assert "→" in wrong.stdout
    assert (await site.run("doctor", HLF_SYNC_LEASE_SECONDS="1")).code == 78
    assert (await site.run("doctor", DATABASE_URL="postgresql://127.0.0.1:9/x")).code == 69
    assert site.requests() == []


async def test_an_error_in_json_mode_is_one_document_too(site: Site) -> None:
    """
    A program that reads stdout always gets JSON.
    """
    run = await site.run("status", "--json", HLF_ORGANIZATION_ID="")
    assert json.loads(run.stdout)["exit_code"] == run.code == 78


async def test_settings_that_are_wrong_are_all_named_at_once(site: Site) -> None:
    """
    Nobody has to mend one setting after the other.
    """
    run = await site.run(
        "drain", HLF_TIMEZONE="Oslo", HLF_SYNC_CONCURRENCY="many", HLF_SYNC_BATCH="0"
    )
    _says(run, 78, "HLF_TIMEZONE", "HLF_SYNC_CONCURRENCY", "HLF_SYNC_BATCH")


async def test_plain_http_to_another_machine_is_refused(site: Site) -> None:
    """
    A secret does not travel in the open.
    """
    run = await site.run("drain", HLF_DYNAMICS_URL="http://crm.example")
    _says(run, 78, "http")


async def test_a_closed_gate_with_nothing_behind_it_is_no_work_left(site: Site) -> None:
    """
    A pause is no reason for cron to complain while nobody waits.
    """
    assert (await site.run("pause")).code == 0

    assert (await site.run("drain")).code == 0


async def test_a_command_that_is_interrupted_says_so_by_its_exit_code_alone(site: Site) -> None:
    """
    Ctrl+C while a database keeps silent: no trace, and no exit code that means a bug.
    """
    connected = asyncio.Event()

    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Only when it waits for an answer: while its socket is ready, Python 3.11's wait_for may
        # swallow the interrupt.
        await reader.readexactly(8)
        connected.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(keep_silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        site.cold = True  # as somebody types it
        status = await site.start("status", DATABASE_URL=f"postgresql://127.0.0.1:{port}/x")
        await connected.wait()
        status.send_signal(signal.SIGINT)
        _, stderr = await status.communicate()

    assert status.returncode == 130
    assert stderr == b""

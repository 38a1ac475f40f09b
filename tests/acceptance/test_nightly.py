"""
The night run as cron has it: everything in one command, whatever breaks a part of it.
"""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.acceptance.site import NEXT_YEAR
from tests.conftest import until
from tests.factories import YESTERDAY
from worker.coordinator import nights
from worker.dynamics.sandbox import Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path
    from typing import Any

    from tests.acceptance.site import Run, Site
    from tests.factories import Mentor

NOWHERE = "http://127.0.0.1:9"
PARTS = ["expire", "reconcile", "remind", "redrive", "drain", "reminders"]


def part(run: Run, name: str) -> Any:  # noqa: ANN401 (JSON)
    """
    What one part says of itself.
    """
    [found] = [one for one in run.document["parts"] if one["part"] == name]
    return found


async def shown(site: Site, number: int) -> Sequence[Mentor]:
    """
    So many certified mentors whom the portal shows, with everything confirmed.
    """
    mentors = await site.world.mentors(number)
    await site.world.execute("UPDATE public.certifications SET expires_on = :day", day=NEXT_YEAR)
    site.link(mentors, visible=False)
    run = await site.run("nightly", HLF_SYNC_BATCH="100")
    assert run.code == 0, run
    assert await site.wrongs() == []
    return mentors


async def test_a_night_does_everything_and_says_so(site: Site) -> None:
    """
    As text and as JSON with stable keys; the second time there is nothing to do.
    """
    mentors = await site.world.mentors(3)
    site.link(mentors)

    run = await site.run("nightly", "--json")

    assert run.code == 0, run.stderr
    assert run.document.keys() == {"today", "ok", "verdict", "parts"}
    assert [one["part"] for one in run.document["parts"]] == PARTS
    assert all(
        one.keys() == {"part", "verdict", "did", "skipped", "left", "failed", "why"}
        for one in run.document["parts"]
    )
    assert part(run, "expire")["did"] == {"certifications": 3, "mentors": 3}
    assert part(run, "drain")["did"] == {"delivered": 3, "superseded": 0, "skipped": 0, "dead": 0}
    assert [site.shows(one) for one in mentors] == [False] * 3

    again = await site.run("nightly")
    assert again.code == 0
    assert again.stdout.splitlines() == [
        "expire: nothing to do.",
        "reconcile: nothing to do.",
        "remind: nothing to do.",
        "redrive: nothing to do.",
        "drain: nothing to do.",
        "reminders: nothing to do.",
    ]
    assert len(site.requests()) == 3


async def test_whatever_was_changed_behind_our_back_is_right_after_one_night(site: Site) -> None:
    """
    A thousand certifications by plain SQL, a row lost, an event deleted, and it says what it found.
    """
    mentors = await shown(site, 1010)
    changed, lost, silenced = mentors[:1000], mentors[1000], mentors[1001]
    world = site.world
    await world.execute(
        "UPDATE public.certifications SET status = 'expired', expired_at = now()"
        " WHERE id = ANY (:ids)",
        ids=[one.certification_id for one in [*changed, lost]],
    )
    await world.execute("DELETE FROM public.portal_visibility WHERE mentor_id = :id", id=lost.id)
    await world.execute(
        "UPDATE public.certifications SET expires_on = :day WHERE id = :id",
        day=YESTERDAY,
        id=silenced.certification_id,
    )
    assert (await site.run("expire")).code == 0
    await world.execute("DELETE FROM outbox.events")

    run = await site.run("nightly", "--json", HLF_SYNC_BATCH="100")

    assert run.code == 0, run.stdout
    assert part(run, "reconcile")["did"] == {
        "missing": 1,
        "visibility": 1000,
        "pauses": 1001,
        "unconfirmed": 1,
    }
    assert part(run, "drain")["did"]["delivered"] == 1002
    assert await site.wrongs() == []
    assert [site.shows(one) for one in mentors] == [False] * 1002 + [True] * 8
    status = await site.run("status", "--json")
    assert (status.code, status.document["in_order"]) == (0, 1010)
    again = await site.run("nightly", "--json")
    assert set(part(again, "reconcile")["did"].values()) == {0}


async def test_a_wrong_set_up_of_dynamics_stops_no_other_part(site: Site) -> None:
    """
    Exit 78, and mentors are expired and reconciled all the same.
    """
    await site.world.mentor()
    await site.world.mentor(expires_on=NEXT_YEAR)

    run = await site.run("nightly", "--json", HLF_DYNAMICS_CLIENT_SECRET="")

    assert run.code == 78
    assert (run.document["verdict"], run.document["ok"]) == ("configuration", False)
    assert "HLF_DYNAMICS_CLIENT_SECRET" in part(run, "drain")["why"]
    assert part(run, "expire")["did"]["certifications"] == 1
    assert part(run, "reconcile")["did"]["missing"] == 1
    assert len(await site.world.rows("SELECT FROM outbox.events")) == 2


async def test_a_part_that_breaks_stops_no_other(site: Site) -> None:
    """
    Nobody is paused any more, so nobody expires; whoever waits is delivered.
    """
    waiting, _ = mentors = await site.world.mentors(2)
    site.link(mentors)
    await site.world.certifications.expire(waiting.certification_id)
    await site.world.execute(
        "ALTER TABLE public.mentor_pauses ADD CONSTRAINT refusal CHECK (false) NOT VALID"
    )
    try:
        run = await site.run("nightly", "--json")
    finally:
        await site.world.execute("ALTER TABLE public.mentor_pauses DROP CONSTRAINT refusal")

    assert run.code == 1
    assert part(run, "expire")["verdict"] == "unexpected"
    assert "IntegrityError" in part(run, "expire")["why"]
    assert part(run, "drain")["did"]["delivered"] == 1
    assert "nightly.part_failed" in run.stderr


async def test_a_database_that_is_away_is_one_sentence(site: Site) -> None:
    """
    Exit 69, and whoever listens outside hears of it.
    """
    async with listener() as (url, heard):
        run = await site.run(
            "nightly",
            DATABASE_URL="postgresql://me:hidden@127.0.0.1:9/x",
            HLF_NIGHTLY_PING_URL=url,
        )

    assert run.code == 69
    assert run.stderr.count("Error: ") == 1
    assert "hidden" not in run.stderr
    assert [path for path, _ in heard] == ["/a-token/start", "/a-token/fail"]
    assert "DATABASE_URL" in heard[1][1]


async def test_a_failure_that_needs_a_person_is_exit_3(site: Site) -> None:
    """
    The run did its work.
    """
    await site.world.mentor(linked=False)

    run = await site.run("nightly", "--json")

    assert (run.code, run.document["ok"]) == (3, True)
    assert part(run, "drain")["failed"] == 1


async def test_what_died_of_an_outage_goes_again(site: Site) -> None:
    """
    The failure is recoverable: the night tries without anybody asking.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    await site.run("expire")
    site.sandbox.order(Status(status=503, target="data", times=None))
    assert (await site.run("drain", HLF_SYNC_REQUEST_SECONDS="1")).code in {3, 69, 75}
    site.sandbox.call_off()
    await site.world.execute("DELETE FROM outbox.gates")
    assert (await site.run("failures")).code == 3

    run = await site.run("nightly", "--json")

    assert (run.code, part(run, "redrive")["did"]) == (
        0,
        {"mentors": 1, "reminders": 0},
    )
    assert site.shows(mentor) is False


async def test_when_the_time_is_over_the_rest_is_left_for_the_next_run(site: Site) -> None:
    """
    Exit 75; nothing is begun any more, and nothing is lost.
    """
    mentor = await site.world.mentor()
    site.link([mentor])

    run = await site.run("nightly", "--json", "--max-seconds", "0.000001")

    assert (run.code, run.document["verdict"]) == (75, "work_left")
    assert (await site.run("nightly")).code == 0
    assert site.shows(mentor) is False


async def test_today_is_one_date_for_all_parts(site: Site) -> None:
    """
    Also one in the future.
    """
    mentor = await site.world.mentor(expires_on=NEXT_YEAR)
    site.link([mentor])

    run = await site.run("nightly", "--json", "--today", "2099-01-01")

    assert (run.code, run.document["today"]) == (0, "2099-01-01")
    assert part(run, "expire")["did"]["mentors"] == 1
    assert site.shows(mentor) is False


async def test_each_run_is_noted_and_a_killed_one_shows(site: Site) -> None:
    """
    When, good or bad, and the summary without names.
    """
    await site.world.mentor(linked=False)
    run = await site.run("nightly", "--json")
    async with site.world.engine.connect() as connection:
        last = await nights.last(connection, organization_id=site.world.hlf)
    assert last is not None
    assert last.finished_at is not None
    assert last.finished_at >= last.started_at
    assert (last.ok, last.summary) == (True, run.document)
    assert "A mentor" not in json.dumps(last.summary)

    mentors = await site.world.mentors(1)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=30)
    process = await site.start("nightly")
    await until(site.in_flight)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    async with site.world.engine.connect() as connection:
        last = await nights.last(connection, organization_id=site.world.hlf)
    assert last is not None
    assert (last.finished_at, last.ok, last.summary) == (None, None, None)


async def test_the_latest_runs_are_kept_and_others_are_left_alone(site: Site) -> None:
    """
    400 of each organisation.
    """
    for organization in (site.world.hlf, site.world.other):
        await site.world.execute(
            "INSERT INTO outbox.nightly_runs (organization_id)"
            " SELECT :id FROM generate_series(1, 405)",
            id=organization,
        )

    assert (await site.run("nightly")).code == 0

    kept = await site.world.rows(
        "SELECT organization_id, count(*) FROM outbox.nightly_runs GROUP BY 1"
    )
    assert dict(map(tuple, kept)) == {site.world.hlf: 400, site.world.other: 405}


# ------------------------------------------------------------------------------- the ping


@asynccontextmanager
async def listener(
    *, status: int = 200, silent: bool = False
) -> AsyncIterator[tuple[str, list[tuple[str, str]]]]:
    """
    Somebody outside, and what they heard: (path, body).
    """
    heard: list[tuple[str, str]] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        body = (await reader.readexactly(length)).decode()
        heard.append((head.split()[1], body))
        if silent:
            await reader.read()
        else:
            writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/a-token", heard


async def test_somebody_outside_hears_the_beginning_and_a_good_end(
    site: Site, tmp_path: Path
) -> None:
    """
    The address may be in a file, and is never said.
    """
    file = tmp_path / "ping"
    async with listener() as (url, heard):
        file.write_text(url + "/\n")
        run = await site.run("nightly", HLF_NIGHTLY_PING_URL_FILE=str(file))

    assert run.code == 0
    assert [path for path, _ in heard] == ["/a-token/start", "/a-token"]
    assert heard[1][1].splitlines() == run.stdout.splitlines()
    assert "a-token" not in run.stdout + run.stderr


async def test_somebody_outside_hears_a_bad_end(site: Site) -> None:
    """
    With the sentences, without a name.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    async with listener(status=500) as (url, heard):
        run = await site.run("nightly", HLF_NIGHTLY_PING_URL=url, HLF_DYNAMICS_CLIENT_SECRET="")

    assert run.code == 78
    assert [path for path, _ in heard] == ["/a-token/start", "/a-token/fail"]
    assert "drain:" in heard[1][1]
    assert "a-token" not in run.stdout + run.stderr


async def test_a_ping_that_nobody_hears_breaks_nothing(site: Site) -> None:
    """
    Nobody there, or somebody who never answers.
    """
    mentor = await site.world.mentor()
    site.link([mentor])

    unheard = await site.run("nightly", HLF_NIGHTLY_PING_URL=f"{NOWHERE}/a-token")
    async with listener(silent=True) as (url, heard):
        silent = await site.run("nightly", HLF_NIGHTLY_PING_URL=url)

    assert (unheard.code, silent.code, len(heard)) == (0, 0, 2)
    assert site.shows(mentor) is False
    assert "nightly.ping_failed" in unheard.stderr
    assert "a-token" not in unheard.stderr + silent.stderr


async def test_a_wrong_ping_address_is_told_after_the_work_is_done(site: Site) -> None:
    """
    Exit 78, but every part ran; the address is not repeated.
    """
    mentor = await site.world.mentor()
    site.link([mentor])

    run = await site.run(
        "nightly", "--json", HLF_NIGHTLY_PING_URL="http://elsewhere.example/a-token"
    )

    assert run.code == 78
    assert "HLF_NIGHTLY_PING_URL: it must start with https://" in part(run, "ping")["why"]
    assert "a-token" not in run.stdout + run.stderr
    assert site.shows(mentor) is False


# ------------------------------------------------------------------------- several at once


async def test_several_at_once_and_one_killed_are_as_good_as_one(site: Site) -> None:
    """
    One transition and one version per mentor, and the portal is right. Eight at once, over and
    over, are in `tests/chaos/scenarios/nights.py`.
    """
    mentors = await site.world.mentors(40)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=0.5)

    lease = {"HLF_SYNC_LEASE_SECONDS": "11"}
    running = [await site.start("nightly", **lease) for _ in range(3)]
    await until(site.in_flight, seconds=60)
    running[0].send_signal(signal.SIGKILL)
    for process in running:
        async with asyncio.timeout(60):
            await process.communicate()
    await until(lambda: nothing_alive(site), seconds=60)

    assert await site.wrongs() == []
    assert await site.world.value("SELECT max(version) FROM public.portal_visibility") == 1
    assert await site.world.value("SELECT count(*) FROM public.mentor_pauses") == 40


async def nothing_alive(site: Site) -> bool:
    """
    Nothing is on its way any more; the claims of whoever died are taken over.
    """
    await site.run("nightly")
    return not await site.world.value("SELECT count(*) FROM outbox.events")

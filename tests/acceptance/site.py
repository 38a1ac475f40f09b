"""
A whole installation for one test: a database, the sandbox in Dynamics' place, real processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from tests import canaries
from tests.conftest import until
from tests.forked import Forked, fork
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, DEFAULT_TENANT, Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from uuid import UUID

    from tests.factories import Mentor, World
    from worker.dynamics.sandbox import Entry

SECRET = "canary-9c1f-client-secret"  # noqa: S105 (of the sandbox)

NEXT_YEAR = date.today() + timedelta(days=365)  # noqa: DTZ011 (a year, give or take a day)


Command = Forked | asyncio.subprocess.Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """
    What a command printed, no secret among it, and how it exited.
    """

    code: int
    stdout: str
    stderr: str

    def __post_init__(self) -> None:
        assert canaries.found(self.stdout + self.stderr) == []

    @property
    def document(self) -> Any:  # noqa: ANN401 (JSON)
        """
        The one JSON document on stdout.
        """
        return json.loads(self.stdout)


@dataclass(slots=True, kw_only=True)
class Site:
    """
    Everything that one test runs against.

    Args:
        environment: of every command; change it to break something.
        cold: whether each command is an interpreter of its own, which takes longer.
    """

    world: World
    sandbox: Sandbox
    environment: dict[str, str]
    cold: bool = False
    workers: list[Command] = field(default_factory=list)

    async def run(self, *arguments: str, seconds: float = 60, **environment: str) -> Run:
        """
        Run a command to its end.
        """
        process = await self.start(*arguments, **environment)
        async with asyncio.timeout(seconds):
            stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return Run(code=process.returncode, stdout=stdout.decode(), stderr=stderr.decode())

    async def start_worker(self, **environment: str) -> Command:
        """
        Start `hlf-sync worker`; it is ended with the test.
        """
        worker = await self.start("worker", **environment)
        self.workers.append(worker)
        return worker

    async def kill(self, worker: Command) -> None:
        """
        SIGKILL: no goodbye of any kind.
        """
        worker.send_signal(signal.SIGKILL)
        await worker.communicate()

    async def start(self, *arguments: str, **environment: str) -> Command:
        """
        Start a command; whoever does waits for its end.
        """
        environment = self.environment | environment
        if not self.cold:
            return await fork(arguments, environment)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "worker", *arguments),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def end(self) -> list[Run]:
        """
        End every worker that still runs, kindly, and return what each said.
        """
        said = []
        for worker in self.workers:
            if worker.returncode is None:
                worker.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                stdout, stderr = await worker.communicate()
            said.append(
                Run(code=worker.returncode or 0, stdout=stdout.decode(), stderr=stderr.decode())
            )
        return said

    # ------------------------------------------------------------------------- the portal

    def link(self, mentors: Iterable[Mentor], *, visible: bool = True) -> None:
        """
        Give these mentors a row in Dynamics.
        """
        self.sandbox.add_rows(
            {
                "contacts": {
                    str(mentor.dynamics_id): {"hlf_portalvisible": visible} for mentor in mentors
                }
            }
        )

    def shows(self, mentor: Mentor) -> object:
        """
        What the portal shows for a mentor; None if there is no row.
        """
        row = self.sandbox.rows["contacts"].get(str(mentor.dynamics_id), {})
        return row.get("hlf_portalvisible")

    def requests(self, mentor: Mentor | None = None) -> list[Entry]:
        """
        The data requests that arrived, of one mentor or all, in the order they began.
        """
        return [
            entry
            for entry in self.sandbox.ledger.entries
            if entry.kind != "token" and (mentor is None or entry.key == str(mentor.dynamics_id))
        ]

    async def confirmed(self, *mentors: Mentor, seconds: float = 30) -> None:
        """
        Wait until Dynamics has confirmed what the database wants, for these or for all.
        """
        ids = [mentor.id for mentor in mentors]

        async def settled() -> bool:
            return not await self.world.value(
                "SELECT count(*) FROM public.portal_visibility AS desired"
                " LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id, version)"
                " WHERE confirmed.version IS NULL AND desired.organization_id = :hlf"
                "   AND (desired.mentor_id = ANY (:ids) OR :everybody)",
                hlf=self.world.hlf,
                ids=ids,
                everybody=not ids,
            )

        await until(settled, seconds=seconds)

    async def in_flight(self) -> int:
        """
        How many events are claimed.
        """
        return int(
            await self.world.value(
                "SELECT count(*) FROM outbox.events WHERE claim_token IS NOT NULL"
            )
        )

    async def wrongs(self) -> list[tuple[UUID, bool, object]]:
        """
        Mentors for whom the portal does not show what the database says, failures left out.
        """
        rows = await self.world.rows(
            "SELECT desired.mentor_id, desired.visible, mentor.dynamics_id"
            " FROM public.portal_visibility AS desired"
            " JOIN public.mentors AS mentor ON mentor.id = desired.mentor_id"
            " WHERE desired.organization_id = :hlf AND NOT EXISTS ("
            "   SELECT FROM public.dynamics_sync_failures AS failure"
            "    WHERE failure.mentor_id = desired.mentor_id AND failure.resolved_at IS NULL)",
            hlf=self.world.hlf,
        )
        table = self.sandbox.rows["contacts"]
        return [
            (row.mentor_id, row.visible, shown)
            for row in rows
            if (shown := table.get(str(row.dynamics_id), {}).get("hlf_portalvisible"))
            is not row.visible
        ]


@asynccontextmanager
async def open_site(
    world: World, database_url: str, *, direct_url: str = ""
) -> AsyncIterator[Site]:
    """
    Put a site up, and take it down whatever happened.

    Args:
        direct_url: where to listen, if `database_url` goes through a pooler.
    """
    listening = {"LISTEN_DATABASE_URL": direct_url} if direct_url not in {"", database_url} else {}
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
        site = Site(
            world=world,
            sandbox=sandbox,
            environment={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": database_url,
                "HLF_ORGANIZATION_ID": str(world.hlf),
                "HLF_DYNAMICS_URL": running.url,
                "HLF_DYNAMICS_AUTHORITY": running.url,
                "HLF_DYNAMICS_TENANT_ID": DEFAULT_TENANT,
                "HLF_DYNAMICS_CLIENT_ID": DEFAULT_CLIENT_ID,
                "HLF_DYNAMICS_CLIENT_SECRET": SECRET,
                "HLF_SYNC_POLL_SECONDS": "0.1",
                "PYTHONWARNINGS": "error",
            }
            | listening,
        )
        try:
            yield site
        finally:
            await site.end()

"""
The ground on which things are broken: a server, a database with its journal, the sandbox in
Dynamics' place, proxies before both, mentors, and processes.

    producers ──► proxy ──► PostgreSQL ◄── proxy ◄── workers, drains ──► proxy ──► sandbox

A scenario breaks it as it likes (safety has to hold meanwhile), heals it, and lets it come to
rest (liveness); then the checker compares both sides.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from alembic import command

from tests.chaos import journal, processes, producer, server
from tests.chaos.checker import Findings, check
from tests.chaos.failpoints import Arming, Fired, Scale, read_fired
from tests.chaos.proxy import listening
from tests.conftest import ROOT, alembic_config, environment, until
from tests.factories import YESTERDAY, Mentor, World
from worker import database
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, DEFAULT_TENANT, Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from datetime import date

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.chaos.processes import Process
    from tests.chaos.proxy import Proxy
    from tests.chaos.server import Server

SECRET = "canary-5e0d-client-secret"  # noqa: S105 (of the sandbox)

LEASE_SECONDS = 2.0
REQUEST_SECONDS = 0.9
POLL_SECONDS = 0.2
STARTED = "worker.started"
PATIENCE_SECONDS = 120.0
"""How long a scenario waits for rest before it gives up."""


@dataclass(slots=True, kw_only=True)
class Ground:
    """
    Everything that one scenario runs on.

    Attributes:
        luck: of this scenario; everything random is drawn from it.
        database_proxy, portal_proxy: what workers and producers go through.
        measured: figures of the scenario's own, by name.
        recoveries: seconds from a fault's end to work going on, by the kind of fault.
    """

    seed: int
    server: Server
    sandbox: Sandbox
    world: World
    engine: AsyncEngine
    database_proxy: Proxy
    portal_proxy: Proxy
    folder: Path
    environment: dict[str, str]
    scale: Scale
    pooled: bool = False
    luck: random.Random = field(init=False)
    armed: dict[str, Arming] = field(default_factory=dict)
    running: list[Process] = field(default_factory=list)
    ended: list[Process] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    started: int = 0

    def __post_init__(self) -> None:
        self.luck = random.Random(self.seed)  # noqa: S311 (no secret)

    # -------------------------------------------------------------------------- people

    async def mentors(
        self, number: int, *, visible: bool = True, expires_on: date = YESTERDAY
    ) -> list[Mentor]:
        """
        So many mentors of HLF, with a row in Dynamics.
        """
        mentors = await self.world.mentors(number, expires_on=expires_on)
        self.sandbox.add_rows(
            {"contacts": {str(one.dynamics_id): {"hlf_portalvisible": visible} for one in mentors}}
        )
        return mentors

    # ----------------------------------------------------------------------- processes

    async def start(
        self, *arguments: str, cold: bool = False, straight: bool = False, **changes: str
    ) -> Process:
        """
        Start `hlf-sync` with these arguments.

        Args:
            straight: to the database without a proxy.
            changes: to its environment.
        """
        self.started += 1
        who = f"{arguments[0]}-{self.started}"
        port = None if straight else self.database_proxy.port
        spec = processes.Spec(
            arguments=arguments,
            environment=self.environment
            | {"DATABASE_URL": self.server.url("hlf", port=port, who=who)}
            | changes,
            output=str(self.folder / f"{who}.log"),
            fired=str(self.fired_folder),
            armed=self.armed,
            scale=self.scale,
        )
        process = await (processes.start_cold if cold else processes.fork)(spec)
        self.running.append(process)
        return process

    async def start_worker(self) -> Process:
        """
        Start a worker and wait until it is one: before, an unreachable database ends it.
        """
        worker = await self.start("worker")
        output = worker.output
        await until(lambda: output.exists() and STARTED in output.read_text(), seconds=60)
        return worker

    async def produce(self, mentors: Iterable[Mentor], **orders: Any) -> Process:  # noqa: ANN401
        """
        Start a producer; see `producer.Orders`.
        """
        document = producer.Orders(
            organization_id=str(self.world.hlf),
            certifications=[(str(one.certification_id), str(one.id)) for one in mentors],
            seed=self.luck.randrange(1 << 30),
            notes=str(self.folder / f"{processes.PRODUCE}-{self.started + 1}.notes"),
            **orders,
        )
        # Not through a pooler, which would not pass on who it is.
        return await self.start(processes.PRODUCE, document.to_json(), straight=self.pooled)

    async def end(self, process: Process, number: int = signal.SIGTERM) -> int:
        """
        End a process, and return how it ended.
        """
        process.send(number)
        code = await process.wait()
        self.running.remove(process)
        self.ended.append(process)
        return code

    async def reap(self) -> list[Process]:
        """
        The processes that have ended by themselves since the last time.
        """
        over = [process for process in self.running if process.code is not None]
        for process in over:
            await process.wait()
            self.running.remove(process)
            self.ended.append(process)
        return over

    async def end_all(self) -> None:
        """
        End every process, kindly.
        """
        for process in list(self.running):
            process.send(signal.SIGCONT)
            with suppress(TimeoutError):
                async with asyncio.timeout(20):
                    await self.end(process)
                    continue
            await self.end(process, signal.SIGKILL)

    @property
    def fired_folder(self) -> Path:
        """
        Where failpoints note that they went off.
        """
        return self.folder / "fired"

    def fired(self) -> list[Fired]:
        """
        Which failpoints went off so far.
        """
        return read_fired(self.fired_folder)

    # ---------------------------------------------------------------------- two phases

    def heal(self) -> None:
        """
        All faults stop.
        """
        self.sandbox.call_off()
        self.sandbox.adjust(latency_seconds=0)
        self.database_proxy.heal()
        self.portal_proxy.heal()

    async def come_to_rest(self) -> None:
        """
        Heal, let a worker run until nothing is alive, retry what failed, once more.

        The clock starts when the last producer is done and a worker is there.
        """
        self.heal()
        await self.reap()
        if not any(process.output.name.startswith("worker") for process in self.running):
            await self.start("worker")
        began = time.monotonic()
        await self.nothing_alive()
        self.recoveries["at rest"] = [time.monotonic() - began]
        if await self.world.value(
            "SELECT count(*) FROM public.dynamics_sync_failures WHERE resolved_at IS NULL"
        ):
            retry = await self.start("retry", "--all", "--json", straight=True)
            await retry.wait()
            await self.nothing_alive()

    async def nothing_alive(self, *, seconds: float = PATIENCE_SECONDS) -> None:
        """
        Wait until no event is left.
        """

        async def nothing() -> bool:
            return not await self.world.value("SELECT count(*) FROM outbox.events")

        await until(nothing, seconds=seconds)

    async def claims(self, who: str) -> int:
        """
        How often this process has claimed something.
        """
        return int(
            await self.world.value(
                "SELECT count(*) FROM chaos.journal WHERE what = 'claimed' AND who = :who",
                who=who,
            )
        )

    async def check(self) -> Findings:
        """
        End all processes and compare both sides.
        """
        await self.end_all()
        await self.engine.dispose()
        return await asyncio.to_thread(self._check)

    def _check(self) -> Findings:
        with psycopg.connect(self.server.url("hlf"), autocommit=True) as connection:
            notes = producer.read_notes(self.folder)
            journal.present(
                connection,
                requests=self.sandbox.ledger.entries,
                portal={
                    row: fields["hlf_portalvisible"]
                    for row, fields in self.sandbox.rows["contacts"].items()
                },
                acknowledged=[
                    (note.mentor, note.version)
                    for _, note in notes
                    if note.state == "saved" and note.version is not None
                ],
            )
            return check(
                connection,
                notes=notes,
                outputs=sorted(self.folder.glob("*.log")),
                canary=SECRET,
                lease_seconds=LEASE_SECONDS,
            )


@asynccontextmanager
async def opened(
    seed: int,
    *,
    binaries: Path | None = None,
    disk_megabytes: int | None = None,
    scale: Scale | None = None,
    pooler: bool = False,
    changes: Mapping[str, str] | None = None,
) -> AsyncIterator[Ground]:
    """
    A ground with nobody on it yet.

    Args:
        pooler: put PgBouncer before the database.
        changes: to the environment of its processes.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hlf-chaos-run-")))
        (folder / "fired").mkdir()
        postgres = await stack.enter_async_context(
            server.running(binaries, disk_megabytes=disk_megabytes)
        )
        await asyncio.to_thread(_prepare, postgres.url(), postgres.url("hlf"))
        through = None
        if pooler:
            through = await stack.enter_async_context(_pooled(postgres))
        database_proxy = await stack.enter_async_context(
            listening("127.0.0.1", through or postgres.port)
        )
        sandbox = Sandbox(
            registrations=[
                {
                    "tenant": DEFAULT_TENANT,
                    "client_id": DEFAULT_CLIENT_ID,
                    "client_secret": SECRET,
                }
            ]
        )
        dynamics = await stack.enter_async_context(sandbox.serve())
        portal_proxy = await stack.enter_async_context(
            listening("127.0.0.1", int(dynamics.url.rpartition(":")[2]))
        )
        engine = database.connect(
            postgres.url("hlf", who="harness"), application_name="harness", pool_size=5
        )
        stack.push_async_callback(engine.dispose)
        world = World(engine)
        await world.settle_in()
        url = f"http://127.0.0.1:{portal_proxy.port}"
        ground = Ground(
            seed=seed,
            server=postgres,
            sandbox=sandbox,
            world=world,
            engine=engine,
            database_proxy=database_proxy,
            portal_proxy=portal_proxy,
            folder=folder,
            environment={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "PYTHONWARNINGS": "error",
                "HLF_ORGANIZATION_ID": str(world.hlf),
                "HLF_DYNAMICS_URL": url,
                "HLF_DYNAMICS_AUTHORITY": url,
                "HLF_DYNAMICS_TENANT_ID": DEFAULT_TENANT,
                "HLF_DYNAMICS_CLIENT_ID": DEFAULT_CLIENT_ID,
                "HLF_DYNAMICS_CLIENT_SECRET": SECRET,
                "HLF_SYNC_POLL_SECONDS": str(POLL_SECONDS),
                "HLF_SYNC_LEASE_SECONDS": str(LEASE_SECONDS),
                "HLF_SYNC_REQUEST_SECONDS": str(REQUEST_SECONDS),
                "HLF_SYNC_GRACE_SECONDS": "5",
                "HLF_LOG_FORMAT": "json",
                **(changes or {}),
            },
            scale=scale or Scale(),
            pooled=pooler,
        )
        try:
            yield ground
        finally:
            await ground.end_all()


def _prepare(url: str, new: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE hlf")
    with environment(DATABASE_URL=new):
        command.upgrade(alembic_config(), "head")
    with psycopg.connect(new, autocommit=True) as connection:
        journal.install(connection)


@asynccontextmanager
async def _pooled(postgres: Server) -> AsyncIterator[int]:
    from tests.chaos.pooler import pooled  # noqa: PLC0415 (only where it is installed)

    async with pooled(postgres.url("hlf")) as url:
        port = database.parse_url(url).port
        assert port is not None
        yield port

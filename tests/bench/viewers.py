"""
How soon 200 people see on their pages what somebody committed, and how soon a server with all
of them on it has ended.

Nobody notifies here: it is the dashboard's own looking that counts.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from tests.bench.contenders.ours import Ours
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.desk import Desk
from tests.factories import World
from worker import database
from worker.coordinator.app import create_app
from worker.coordinator.callers import Caller
from worker.coordinator.serving import Server, listening_socket
from worker.listening import address_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import HTTPConnection
    from starlette.routing import BaseRoute

VIEWERS = 200
CHANGES = 8
"""In one round; each comes and goes."""

LONGEST_SECONDS = 30.0
"""That anything may take here before the round has failed."""

WORDS = "kan fortsatt være synlig"

WHAT = f"{VIEWERS} people watching"
APPEARED = "s until a change is on all pages, p99"
GONE = "s until it is gone from all pages, p99"
ENDED = "s until a server with all of them has ended"


class Anybody:
    """
    Lets everybody in, as a coordinator of one organisation; a person is a header.
    """

    logs_in = False

    def __init__(self, organization_id: UUID) -> None:
        self._organization_id = organization_id

    async def caller(self, request: HTTPConnection) -> Caller | None:
        """
        Whoever the request says it is from.
        """
        name = request.headers["x-viewer"]
        return Caller(
            subject=name, name=name, organization_id=self._organization_id, role="coordinator"
        )

    def routes(self) -> list[BaseRoute]:
        """
        None.
        """
        return []


class Wall:
    """
    What is on everybody's page.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._alarmed: dict[int, tuple[bool, float]] = {}

    async def show(self, viewer: int, html: str) -> None:
        """
        Somebody's page changed.
        """
        async with self._changed:
            self._alarmed[viewer] = (WORDS in html, time.perf_counter())
            self._changed.notify_all()

    async def until(self, holds: Callable[[list[bool]], bool]) -> list[float]:
        """
        Wait until it holds of all pages; returns when each came to show what it shows.
        """

        def settled() -> bool:
            pages = [alarmed for alarmed, _ in self._alarmed.values()]
            return len(pages) == VIEWERS and holds(pages)

        async with asyncio.timeout(LONGEST_SECONDS), self._changed:
            await self._changed.wait_for(settled)
            return [at for _, at in self._alarmed.values()]


async def viewers(ground: Ground) -> list[Figure]:
    """
    A server in this process, and everybody on sockets of their own.
    """
    rounds: list[tuple[float, float, float]] = []
    for _ in range(ground.scale.rounds):
        async with ground.databases.fresh(Ours(name="ours")) as url:
            engine = database.connect(url, application_name="bench")
            try:
                rounds.append(await _round(engine))
            finally:
                await engine.dispose()
        ground.advance(WHAT)
    appeared, gone, ended = zip(*rounds, strict=True)
    return [
        Figure(what=WHAT, who="ours", unit=APPEARED, rounds=appeared),
        Figure(what=WHAT, who="ours", unit=GONE, rounds=gone),
        Figure(what=WHAT, who="ours", unit=ENDED, rounds=ended),
    ]


async def _round(engine: AsyncEngine) -> tuple[float, float, float]:
    world = World(engine)
    await world.settle_in()
    desk, wall = Desk(world), Wall()
    appeared: list[float] = []
    gone: list[float] = []
    async with asyncio.TaskGroup() as watching, _served(engine, world.hlf) as url:
        for number in range(VIEWERS):
            watching.create_task(_watch(url, number, wall))
        await wall.until(lambda pages: not any(pages))
        for _ in range(CHANGES):
            mentor = await desk.wanted()
            await desk.on_its_way(mentor)
            began = time.perf_counter()
            appeared += [at - began for at in await wall.until(all)]
            await desk.deliver()
            began = time.perf_counter()
            gone += [at - began for at in await wall.until(lambda pages: not any(pages))]
        began = time.perf_counter()
    return _p99(appeared), _p99(gone), time.perf_counter() - began


@asynccontextmanager
async def _served(engine: AsyncEngine, organization_id: UUID) -> AsyncIterator[str]:
    app = create_app(engine, access=Anybody(organization_id), timezone="Europe/Oslo")
    with listening_socket("127.0.0.1", 0, login=False) as listener:
        server = Server(app, on_end=app.end_streams)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            await serving


async def _watch(url: str, number: int, wall: Wall) -> None:
    """
    Until the server ends.
    """
    event = ""
    timeout = httpx.Timeout(LONGEST_SECONDS)
    headers = {"x-viewer": str(number)}
    async with (
        httpx.AsyncClient(trust_env=False, timeout=timeout) as client,
        client.stream("GET", f"{url}/stream?lang=nb", headers=headers) as answer,
    ):
        async for line in answer.aiter_lines():
            name, _, value = line.partition(":")
            if name == "event":
                event = value.strip()
            elif name == "data" and event == "state":
                await wall.show(number, json.loads(value)["html"])


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


MEASURES = (
    Measure(
        name="viewers",
        question="How soon does everybody see what was committed?",
        run=viewers,
        goals=(
            Goal(what=WHAT, unit=APPEARED, most=True, bounds=[Bound(factor=2, called="1 s")]),
            Goal(what=WHAT, unit=GONE, most=True, bounds=[Bound(factor=2, called="1 s")]),
            Goal(what=WHAT, unit=ENDED, most=True, bounds=[Bound(factor=5, called="1 s")]),
        ),
    ),
)

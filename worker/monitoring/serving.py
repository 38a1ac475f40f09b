"""
The port at which a worker tells how it is.

    /live       200 as long as the event loop turns
    /ready      200 while it claims and has answers from the database; else 503 and one sentence
    /metrics    everything else, as Prometheus reads it
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import structlog
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from typing_extensions import override

from worker.answering import Server
from worker.listening import address_of
from worker.monitoring.figures import Reader
from worker.monitoring.metrics import Metrics
from worker.monitoring.telling import FiguresCollector
from worker.monitoring.watching import Watch, patience

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from prometheus_client import Metric
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request

    from outbox import Destination

log = structlog.get_logger(__name__)

GRACE_SECONDS = 1
"""For answers under way when the worker ends."""

IDLE_SECONDS = 5


class Monitor:
    """
    Lets the world see how one worker is.

    Args:
        listener: is served, and closed by whoever opened it.
        poll_seconds: of destinations that have none of their own.
        revision: of the migration that this release needs.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        organization_id: UUID,
        destinations: Sequence[Destination],
        listener: socket.socket,
        poll_seconds: float,
        version: str,
        revision: str,
    ) -> None:
        names = [one.name for one in destinations]
        self._organization_id = organization_id
        self._listener = listener
        self._revision = revision
        self._names = names
        self._metrics = Metrics(organization_id=organization_id, version=version, revision=revision)
        self._reader = Reader(engine, organization_id=organization_id, destinations=names)
        self._watches = {
            one.name: Watch(
                one.name,
                self._metrics.of(one.name),
                patience_seconds=patience(one, poll_seconds=poll_seconds),
            )
            for one in destinations
        }
        self.destinations = [replace(one, observer=self._watches[one.name]) for one in destinations]
        """The same, watched."""

    @property
    def trouble(self) -> str | None:
        """
        Why the worker is not ready, in one sentence; None if it is.
        """
        for watch in self._watches.values():
            if watch.trouble:
                return watch.trouble
        latest = self._reader.latest
        if latest is not None and (latest.revision or "") < self._revision:
            return (
                f"The database is at migration {latest.revision or 'none'}, and this release "
                f"needs {self._revision}: run `make migrate`."
            )
        return None

    def done(self, job: str) -> None:
        """
        A job succeeded just now.
        """
        self._metrics.succeeded(job, at=time.time())

    async def serve(self) -> None:
        """
        Answer until cancelled.
        """
        server = Server(
            self.app(), lifespan="off", idle_seconds=IDLE_SECONDS, grace_seconds=GRACE_SECONDS
        )
        log.info("monitoring.started", url=address_of(self._listener))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]), name="monitoring")
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await serving
            await self._reader.aclose()

    def app(self) -> Starlette:
        """
        The three answers.
        """
        return Starlette(
            routes=[
                Route("/live", self._live),
                Route("/ready", self._ready),
                Route("/metrics", self._tell_metrics),
            ]
        )

    async def _live(self, _request: Request) -> Response:
        return PlainTextResponse("live\n")

    async def _ready(self, _request: Request) -> Response:
        self._reader.ask()  # for the next time: nobody waits here
        if trouble := self.trouble:
            return PlainTextResponse(f"{trouble}\n", status_code=503)
        return PlainTextResponse("ready\n")

    async def _tell_metrics(self, request: Request) -> Response:
        figures = await self._reader.figures()
        self._metrics.ready.set(self.trouble is None)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        for job, at in (figures.jobs if figures else {}).items():
            self._metrics.succeeded(job, at=at)
        told = _Both(
            FiguresCollector(figures, self._names, organization_id=self._organization_id),
            self._metrics.registry,
        )
        return Response(encode(told), headers={"Content-Type": content_type})


class _Both(Collector):
    """
    What the database says and what the process knows, at one moment.
    """

    def __init__(self, *parts: Collector) -> None:
        self._parts = parts

    @override
    def collect(self) -> Iterable[Metric]:
        return chain.from_iterable(part.collect() for part in self._parts)

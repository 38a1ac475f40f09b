"""
Live pages: one look at the database for all who watch.

For each organisation with viewers, one task looks whether anything changed, twice a second and
whenever somebody notifies; if so, each view that is watched is rendered once and goes to all its
viewers. Looking is the truth, notifications only hasten it. A viewer who reads slowly gets the
newest state, not every one.

    state   the view anew: title, HTML, the time
    beat    nothing new, as of that time; not sent unless the database said so
    ended   the caller may not watch any more
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Literal

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute, Route
from typing_extensions import override

from worker.coordinator import callers
from worker.coordinator.pages import language_of
from worker.coordinator.views import NotFoundError, view_of
from worker.coordinator.wording import now
from worker.database import reading
from worker.wakeup import listen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from worker.coordinator.callers import Caller, Role
    from worker.coordinator.views import Fragment, View, Views
    from worker.coordinator.wording import Language, Words
    from worker.wakeup import Connection

log = structlog.get_logger(__name__)

PATH = "/stream"

LOOK_SECONDS = 0.5
"""Between two looks, unless somebody notifies."""

CALM_SECONDS = 0.1
"""Between two looks at least, however much is notified."""

MOST_LOOKED_AT = 10_000
"""Rows of a kind, to see whether anything changed."""

REST = 3
"""A look that took long is followed by a pause so many times as long, up to `LONGEST_SECONDS`."""

LONGEST_SECONDS = 0.8

RENDER_SECONDS = 10.0
"""A view is rendered so often even if nothing changed: it says how long ago things were,
and what came and went between two looks left no trace."""

BEAT_SECONDS = 5.0
FRESH_SECONDS = 5.0
"""A look older than that is nothing to say "nothing new" by."""

CHECK_SECONDS = 60.0
"""How often it is asked whether the caller may still watch."""

MOST_STREAMS = 10
"""Of one person; a browser has six to a server."""

RECONNECT_MILLISECONDS = 2000

FINGERPRINT = text("""
SELECT concat_ws('/', waiting.rows, waiting.newest, waiting.versions, waiting.attempts,
                 waiting.claimed, waiting.latest, failed.rows, failed.latest,
                 gate.closed_until, gate.closed_until > now(), gate.trips, gate.reason,
                 (SELECT max(at) FROM outbox.audit WHERE organization_id = :organization_id))
  FROM (SELECT count(*) AS rows, max(id) AS newest, sum(version) AS versions,
               sum(attempts) AS attempts, count(claim_token) AS claimed,
               max(available_at) AS latest
          FROM (SELECT id, version, attempts, claim_token, available_at
                  FROM outbox.events
                 WHERE destination = 'dynamics' AND organization_id = :organization_id
                 LIMIT :most) AS event) AS waiting
  CROSS JOIN (SELECT count(*) AS rows, max(attempted_at) AS latest
          FROM (SELECT attempted_at
                  FROM public.dynamics_sync_failures
                 WHERE organization_id = :organization_id AND resolved_at IS NULL
                 LIMIT :most) AS failure) AS failed
  LEFT JOIN outbox.gates AS gate
    ON gate.destination = 'dynamics' AND gate.organization_id = :organization_id
""")
"""Cheap, and another one whenever something on its way, failed or done changes."""


@dataclass(frozen=True, slots=True)
class Topic:
    """
    What is the same for all who watch it.
    """

    organization_id: UUID
    role: Role
    language: Language
    view: View


@dataclass(slots=True, eq=False)
class Channel:
    """
    A topic that somebody watches, and its newest state.
    """

    serial: int = field(default_factory=count().__next__)
    viewers: int = 0
    fragment: Fragment | None = None
    number: int = 0
    ending: Literal["", "lost", "ended"] = ""
    rendered_at: float = float("-inf")
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, ending: Literal["lost", "ended"]) -> None:
        """
        There is nothing to watch any more; if it was only lost, viewers come again.
        """
        self.ending = ending
        self.tell()

    def tell(self) -> None:
        """
        Wake all who wait for news.
        """
        self.news.set()
        self.news = asyncio.Event()


@dataclass(slots=True, eq=False)
class Desk:
    """
    An organisation that somebody watches.

    Args:
        looked_at: when the database last said how things stand, by the monotonic clock.
    """

    caller: Caller
    channels: dict[Topic, Channel] = field(default_factory=dict)
    fingerprint: str | None = None
    looked_at: float = float("-inf")
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Hub:
    """
    Looks on behalf of all who watch, and tells them.

    Args:
        engine: bound, as for pages.
    """

    def __init__(self, engine: AsyncEngine, views: Views) -> None:
        self._engine = engine
        self._views = views
        self._desks: dict[UUID, Desk] = {}
        self._streams: dict[str, int] = {}
        self._birth = token_hex(4)
        self.stopping = asyncio.Event()

    @asynccontextmanager
    async def at_work(
        self, connect: Callable[[], Awaitable[Connection]] | None
    ) -> AsyncIterator[None]:
        """
        Look at once whenever somebody notifies, if there is a connection to hear it by.
        """
        hearing = asyncio.create_task(listen(connect, self.wake)) if connect else None
        try:
            yield
        finally:
            self.stop()
            tasks = [desk.task for desk in self._desks.values()] + [hearing]
            for task in filter(None, tasks):
                task.cancel()
            await asyncio.gather(*filter(None, tasks), return_exceptions=True)

    def wake(self) -> None:
        """
        Something may have changed.
        """
        for desk in self._desks.values():
            desk.wake.set()

    def stop(self) -> None:
        """
        End every stream at once.
        """
        self.stopping.set()
        for desk in self._desks.values():
            for channel in desk.channels.values():
                channel.tell()

    def require_room(self, caller: Caller) -> None:
        """
        Check that this person may watch one more thing.

        Raises:
            HTTPException: too much already.
        """
        if self._streams.get(caller.subject, 0) >= MOST_STREAMS:
            raise HTTPException(429)

    @asynccontextmanager
    async def watching(self, topic: Topic, caller: Caller) -> AsyncIterator[tuple[Desk, Channel]]:
        """
        The channel of a topic, which is kept up to date meanwhile.
        """
        self._streams[caller.subject] = self._streams.get(caller.subject, 0) + 1
        desk = self._desk(topic, caller)
        channel = desk.channels.setdefault(topic, Channel())
        channel.viewers += 1
        desk.wake.set()
        try:
            yield desk, channel
        finally:
            channel.viewers -= 1
            if not channel.viewers:
                desk.channels.pop(topic, None)
            self._streams[caller.subject] -= 1
            if not self._streams[caller.subject]:
                del self._streams[caller.subject]

    def _desk(self, topic: Topic, caller: Caller) -> Desk:
        desk = self._desks.get(topic.organization_id)
        if desk is None:
            desk = Desk(caller=replace(caller, role="viewer"))
            self._desks[topic.organization_id] = desk
            desk.task = asyncio.create_task(self._look_again_and_again(topic.organization_id, desk))
        return desk

    async def _look_again_and_again(self, organization_id: UUID, desk: Desk) -> None:
        """
        As long as anybody watches this organisation.
        """
        try:
            while desk.channels and not self.stopping.is_set():
                desk.wake.clear()
                began = time.monotonic()
                try:
                    await self._look(desk)
                except (SQLAlchemyError, OSError, TimeoutError) as error:
                    log.warning("stream.look_failed", error=type(error).__name__)
                    desk.fingerprint = None
                rest = min(LONGEST_SECONDS, REST * (time.monotonic() - began))
                rest = max(CALM_SECONDS, rest)
                await asyncio.sleep(rest)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS - rest):
                        await desk.wake.wait()
        except Exception:
            log.exception("stream.failed")
            raise
        finally:
            del self._desks[organization_id]
            for channel in desk.channels.values():
                channel.end("lost")

    async def _look(self, desk: Desk) -> None:
        with callers.asking(desk.caller):
            began = time.monotonic()
            async with reading(self._engine) as connection:
                fingerprint = await connection.scalar(
                    FINGERPRINT,
                    {
                        "organization_id": desk.caller.organization_id,
                        "most": MOST_LOOKED_AT,
                    },
                )
            changed = fingerprint != desk.fingerprint
            for topic, channel in list(desk.channels.items()):
                if changed or began - channel.rendered_at > RENDER_SECONDS:
                    await self._render(desk, topic, channel, began)
        desk.fingerprint, desk.looked_at = fingerprint, began

    async def _render(self, desk: Desk, topic: Topic, channel: Channel, began: float) -> None:
        reader = replace(desk.caller, role=topic.role)
        try:
            fragment = await self._views.fragment(
                topic.view, caller=reader, language=topic.language
            )
        except NotFoundError:
            channel.end("ended")
            return
        channel.rendered_at = began
        if channel.fragment is None or (fragment.html, fragment.title) != (
            channel.fragment.html,
            channel.fragment.title,
        ):
            channel.number += 1
            channel.fragment = fragment
            channel.tell()

    def id_of(self, channel: Channel) -> str:
        """
        Of the channel's state; another process has other ones.
        """
        return f"{self._birth}-{channel.serial}-{channel.number}"


def routes() -> list[BaseRoute]:
    """
    Of the stream.
    """
    return [Route(PATH, _stream)]


async def _stream(request: Request) -> Response:
    caller: Caller = request.state.caller
    hub: Hub = request.app.state.hub
    topic = Topic(
        caller.organization_id, caller.role, language_of(request), view_of(request.query_params)
    )
    hub.require_room(caller)
    messages = _messages(request, hub, topic, caller)
    return _Stream(messages)


class _Stream(StreamingResponse):
    """
    Ends as soon as its reader has left, not when there is something to send.
    """

    def __init__(self, messages: AsyncGenerator[str, None]) -> None:
        super().__init__(
            messages, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self._messages = messages

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.stream_response(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            outcomes = await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._messages.aclose()
        if isinstance(error := outcomes[0], Exception) and not isinstance(error, OSError):
            raise error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _messages(
    request: Request, hub: Hub, topic: Topic, caller: Caller
) -> AsyncGenerator[str, None]:
    words: Words = request.app.state.views.words(topic.language)

    def clock(moment: datetime) -> str:
        return words.clock(moment, now=now(), seconds=True)

    async with hub.watching(topic, caller) as (desk, channel):
        yield f"retry: {RECONNECT_MILLISECONDS}\n\n"
        sent = request.headers.get("last-event-id", "")
        checked_at = time.monotonic()
        while not hub.stopping.is_set():
            news = channel.news
            if channel.ending:
                if channel.ending == "ended":
                    yield _message("ended")
                return
            if channel.fragment is not None and hub.id_of(channel) != sent:
                sent = hub.id_of(channel)
                yield _message(
                    "state",
                    id=sent,
                    title=channel.fragment.title,
                    html=channel.fragment.html,
                    clock=clock(channel.fragment.looked_at),
                )
            elif channel.fragment and time.monotonic() - desk.looked_at < FRESH_SECONDS:
                yield _message("beat", clock=clock(now()))
            else:
                yield ":\n\n"
            if time.monotonic() - checked_at >= CHECK_SECONDS:
                checked_at = time.monotonic()
                if not await request.state.still_allowed():
                    yield _message("ended")
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await news.wait()


def _message(event: str, *, id: str = "", **data: str) -> str:  # noqa: A002 (as the field is called)
    head = f"id: {id}\n" if id else ""
    return f"{head}event: {event}\ndata: {json.dumps(data)}\n\n"

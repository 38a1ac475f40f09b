"""
The application: its rooms, and what happens to a request before it comes to one.

    guard       host, other sites' forms, size; headers on every answer
    access      who asks; nobody known: log in, or 401
    callers     from here on the database knows too
    routes      pages, stream, API, static files
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

import structlog
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route
from typing_extensions import override

from worker.coordinator import api, callers, idempotency, pages, problems, sessions, stream
from worker.coordinator.actions import Actions
from worker.coordinator.guard import LOOPBACK_NAMES, Guard
from worker.coordinator.problems import API
from worker.coordinator.stream import Hub
from worker.coordinator.views import Views
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from worker.coordinator.access import Access
    from worker.wakeup import Connection

log = structlog.get_logger(__name__)

TIDY_SECONDS = 3600.0
TIDY_PAGE = 1000

OPEN = ("/login", "/logged-out", "/static/", "/robots.txt")
"""Where nobody has to be known: the beginnings of paths."""


class Dashboard(Starlette):
    """
    Starlette, with the guard around all of it, its own error pages included.
    """

    hosts: Collection[str] = LOOPBACK_NAMES
    https: bool = False

    @override
    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), hosts=self.hosts, https=self.https)

    def end_streams(self) -> None:
        """
        Let live pages go, at once; they come back to whoever serves next.
        """
        self.state.hub.stop()


def create_app(
    engine: AsyncEngine,
    *,
    access: Access,
    timezone: str,
    hosts: Collection[str] = LOOPBACK_NAMES,
    https: bool = False,
    connect_listener: Callable[[], Awaitable[Connection]] | None = None,
) -> Dashboard:
    """
    The dashboard on a database.

    Args:
        engine: the owner's; requests see it through `callers.bound` alone.
        timezone: of the organisation, for dates and times.
        hosts: names by which it may be called.
        https: the public address is https.
        connect_listener: for the notifications that hasten live pages; without, they poll.
    """
    bound = callers.bound(engine)
    views = Views(bound, timezone=timezone)
    actions = Actions(engine, timezone=timezone)

    @asynccontextmanager
    async def lifespan(app: Dashboard) -> AsyncIterator[None]:
        app.state.hub = Hub(bound, views)
        async with aclosing(actions), app.state.hub.at_work(connect_listener), _tidied(engine):
            yield

    app = Dashboard(
        routes=[
            *access.routes(),
            *api.routes(),
            *pages.routes(),
            *stream.routes(),
            Route("/robots.txt", _robots),
        ],
        middleware=[Middleware(KnownCallers, access=access)],
        exception_handlers={
            **dict.fromkeys(KNOWN, _known),
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )
    app.hosts, app.https = hosts, https
    app.state.engine = bound
    app.state.views = views
    app.state.actions = actions
    app.state.timezone = timezone
    app.state.logs_in = access.logs_in
    app.state.login_page = pages.login_page
    return app


@asynccontextmanager
async def _tidied(engine: AsyncEngine) -> AsyncIterator[None]:
    """
    Meanwhile what has ended is removed now and then.
    """
    tidying = asyncio.create_task(_tidy_now_and_then(engine), name="tidying")
    try:
        yield
    finally:
        tidying.cancel()
        await asyncio.wait([tidying])


async def _tidy_now_and_then(engine: AsyncEngine) -> None:
    while True:
        try:
            await tidy(engine)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            log.info("dashboard.not_tidied", error=type(error).__name__)
        await asyncio.sleep(TIDY_SECONDS)


async def tidy(engine: AsyncEngine) -> None:
    """
    Remove sessions and remembered answers that nobody asks for any more, page by page.
    """
    for forget in (sessions.forget, idempotency.forget):
        gone = TIDY_PAGE
        while gone == TIDY_PAGE:
            async with engine.begin() as connection:
                gone = await forget(connection, limit=TIDY_PAGE)


class KnownCallers:
    """
    ASGI middleware: beyond it there is always a caller, for our code and for the database.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Let known callers through, send the others to where they become known.
        """
        if scope["type"] != "http" or scope["path"].startswith(OPEN):
            await self._app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        try:
            caller = await self._access.caller(request)
        except (SyncError, SQLAlchemyError, TimeoutError) as error:
            answer = _answered(Request(scope), error)
            await answer(scope, receive, send)
            return
        if caller is None:
            await self._nobody(scope)(scope, receive, send)
            return

        async def still_allowed() -> bool:
            return await self._access.caller(request) == caller

        request.state.caller = caller
        request.state.still_allowed = still_allowed
        with callers.asking(caller):
            await self._app(scope, receive, send)

    def _nobody(self, scope: Scope) -> Response:
        if scope["path"].startswith((API, stream.PATH)) or not self._access.logs_in:
            return problems.answer(
                401,
                "unauthorized",
                "Nobody is known to ask: send a token.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        came_for = scope["path"] if scope["method"] == "GET" else "/"
        return RedirectResponse(f"/login?next={quote(came_for)}", status_code=303)


async def _robots(_request: Request) -> Response:
    return PlainTextResponse("User-agent: *\nDisallow: /\n")


# ------------------------------------------------------------------------------- errors

KNOWN = (HTTPException, SyncError, SQLAlchemyError, TimeoutError)
"""What is answered with a sentence of its own."""


async def _known(request: Request, error: Exception) -> Response:
    return _answered(request, error)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request.failed", error=type(error).__name__, path=request.url.path, exc_info=error)
    return _answered(request, error)


def _answered(request: Request, error: Exception) -> Response:
    path = request.url.path
    status, kind, sentence = problems.of(error)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        log.warning("request.unanswered", error=type(error).__name__, path=path)
    if path.startswith(API):
        return problems.answer(status, kind, sentence)
    return pages.problem(request, status)

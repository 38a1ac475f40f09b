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
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route
from typing_extensions import override

from worker.coordinator import api, callers, problems
from worker.coordinator.actions import Actions
from worker.coordinator.guard import LOOPBACK_NAMES, Guard
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from worker.coordinator.access import Access

log = structlog.get_logger(__name__)

API = "/api/"

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


def create_app(
    engine: AsyncEngine,
    *,
    access: Access,
    timezone: str,
    hosts: Collection[str] = LOOPBACK_NAMES,
    https: bool = False,
) -> Dashboard:
    """
    The dashboard on a database.

    Args:
        engine: the owner's; requests see it through `callers.bound` alone.
        timezone: of the organisation, for dates and times.
        hosts: names by which it may be called.
        https: the public address is https.
    """
    actions = Actions(engine, timezone=timezone)

    @asynccontextmanager
    async def lifespan(app: Dashboard) -> AsyncIterator[None]:
        app.state.stopping = asyncio.Event()
        async with aclosing(actions):
            yield

    app = Dashboard(
        routes=[*access.routes(), *api.routes(), Route("/robots.txt", _robots)],
        middleware=[Middleware(KnownCallers, access=access)],
        exception_handlers={
            **dict.fromkeys(KNOWN, _known),
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )
    app.hosts, app.https = hosts, https
    app.state.engine = callers.bound(engine)
    app.state.actions = actions
    app.state.timezone = timezone
    return app


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
            await _answered(scope["path"], error)(scope, receive, send)
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
        if scope["path"].startswith(API) or not self._access.logs_in:
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
    return _answered(request.url.path, error)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request.failed", error=type(error).__name__, path=request.url.path, exc_info=error)
    return _answered(request.url.path, error)


def _answered(path: str, error: Exception) -> Response:
    status, kind, sentence = problems.of(error)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        log.warning("request.unanswered", error=type(error).__name__, path=path)
    if path.startswith(API):
        return problems.answer(status, kind, sentence)
    return PlainTextResponse(sentence, status_code=status)

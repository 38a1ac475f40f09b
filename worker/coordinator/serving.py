"""
The dashboard as a process: where it may listen, and how it ends.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from typing_extensions import override

from worker import answering
from worker.coordinator import callers
from worker.coordinator.access import Client, Local, Login
from worker.coordinator.app import create_app
from worker.coordinator.callers import Caller
from worker.coordinator.guard import LOOPBACK_NAMES, hostname
from worker.coordinator.sessions import Sessions
from worker.coordinator.tokens import Issuer
from worker.errors import SettingsError
from worker.http_client import HttpClient, is_loopback
from worker.listening import address_of, bind

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.types import ASGIApp

    from worker.coordinator.access import Access
    from worker.coordinator.app import Dashboard
    from worker.settings import DashboardSettings, Settings
    from worker.wakeup import Connection

log = structlog.get_logger(__name__)

GRACE_SECONDS = 3
"""For requests under way when it is told to end; open streams are told to end at once."""

IDLE_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """
    The dashboard and where it listens.
    """

    app: Dashboard
    listener: socket.socket
    url: str

    async def serve(self) -> None:
        """
        Serve until told to stop.
        """
        log.info("dashboard.started", url=self.url)
        await Server(self.app, on_end=self.app.end_streams).serve(sockets=[self.listener])
        log.info("dashboard.stopped")


@asynccontextmanager
async def open_served(
    engine: AsyncEngine,
    settings: Settings,
    where: DashboardSettings,
    *,
    actor: str,
    secret: Callable[[], str],
    connect_listener: Callable[[], Awaitable[Connection]],
) -> AsyncIterator[Served]:
    """
    The dashboard, listening.

    Args:
        engine: the owner's.
        actor: whoever is at this machine, where nobody logs in.
        secret: of our client at the OpenID provider.
        connect_listener: for the notifications that hasten live pages.

    Raises:
        SettingsError, SchemaError: it may not or cannot be served.
    """
    with listening_socket(where.host, where.port, login=bool(where.issuer)) as listener:
        await callers.require_rows_kept_apart(engine)
        url = where.url.rstrip("/") if where.issuer else address_of(listener)
        async with _access(engine, settings, where, actor=actor, secret=secret) as access:
            app = create_app(
                engine,
                access=access,
                timezone=settings.timezone,
                hosts={hostname(urlsplit(url).netloc)} if access.logs_in else LOOPBACK_NAMES,
                https=url.startswith("https://"),
                connect_listener=connect_listener,
            )
            yield Served(app=app, listener=listener, url=f"{url}/")


@asynccontextmanager
async def _access(
    engine: AsyncEngine,
    settings: Settings,
    where: DashboardSettings,
    *,
    actor: str,
    secret: Callable[[], str],
) -> AsyncIterator[Access]:
    if not where.issuer:
        yield Local(
            Caller(
                subject="local",
                name=actor,
                organization_id=settings.organization_id,
                role="coordinator",
            )
        )
        return
    secret()  # what cannot be read is told at the start
    client = Client(
        id=where.client_id,
        secret=secret,
        audience=where.audience or where.client_id,
        organization_claim=where.organization_claim,
        role_claim=where.role_claim,
    )
    async with HttpClient() as http:
        yield Login(
            Issuer(where.issuer, http=http), client, Sessions(engine), url=where.url.rstrip("/")
        )


def listening_socket(host: str, port: int, *, login: bool) -> socket.socket:
    """
    Where the dashboard listens.

    Args:
        login: people have to log in; without, it is for this machine alone.

    Raises:
        SettingsError: everybody could come in, or the address is not to be had.
    """
    if not login and not is_loopback(host):
        raise SettingsError(
            f"HLF_DASHBOARD_HOST: {host} can be reached from outside, and no login is set up. Set "
            "HLF_OIDC_ISSUER, HLF_OIDC_CLIENT_ID and HLF_DASHBOARD_URL, or listen on 127.0.0.1."
        )
    return bind(host, port, variables="HLF_DASHBOARD_HOST and HLF_DASHBOARD_PORT")


class Server(answering.Server):
    """
    It ends by SIGTERM or SIGINT, kindly, and returns.

    Args:
        on_end: called first; what it leaves open is waited for.
    """

    def __init__(self, app: ASGIApp, *, on_end: Callable[[], None]) -> None:
        super().__init__(app, lifespan="on", idle_seconds=IDLE_SECONDS, grace_seconds=GRACE_SECONDS)
        self._on_end = on_end

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_end()
        await super().shutdown(sockets)

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

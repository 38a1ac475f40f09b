"""
The dashboard as a process: where it may listen, and how it ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import uvicorn
from typing_extensions import override

from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.applications import Starlette

    from worker.coordinator.app import Dashboard

log = structlog.get_logger(__name__)

GRACE_SECONDS = 3
"""For requests under way when it is told to end; open streams are told to end at once."""

BACKLOG = 512
IDLE_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """
    The dashboard and where it listens.
    """

    app: Dashboard
    listener: socket.socket
    url: str


def is_loopback(host: str) -> bool:
    """
    Whether nobody but this machine can reach it.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"HLF_DASHBOARD_HOST and HLF_DASHBOARD_PORT: cannot listen on {host}:{port}: {reason}."
        ) from None
    listener.setblocking(False)  # noqa: FBT003 (as the socket has it)
    return listener


def address_of(listener: socket.socket) -> str:
    """
    The listener's address as a browser takes it, without a slash at its end.
    """
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """
    uvicorn in our own loop: it ends by SIGTERM or SIGINT, kindly, and returns.

    Args:
        on_end: called first; what it leaves open is waited for.
    """

    def __init__(self, app: Starlette, *, on_end: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                loop="none",
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
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


async def serve(served: Served) -> None:
    """
    Serve until told to stop.
    """
    log.info("dashboard.started", url=served.url)
    await Server(served.app, on_end=served.app.end_streams).serve(sockets=[served.listener])
    log.info("dashboard.stopped")

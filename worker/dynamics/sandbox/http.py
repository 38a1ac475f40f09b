"""
An HTTP/1.1 server for loopback only, whose every byte is ours.
"""

from __future__ import annotations

import asyncio
import ipaddress
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from worker.dynamics.sandbox.connection import Connection
from worker.dynamics.sandbox.refusal import SandboxError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from worker.dynamics.sandbox.connection import Exchange

HANDSHAKE_SECONDS = 5.0  # a client that never finishes its TLS handshake is dropped
BACKLOG = 1024  # connections that may wait to be accepted


class _Server:
    """
    All connections of one listening socket, and the tasks that answer them.
    """

    def __init__(
        self,
        handler: Callable[[Exchange], Awaitable[None]],
        *,
        scheme: str,
        clock: Callable[[], float],
    ) -> None:
        self.handler = handler
        self.scheme = scheme
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """
        Run `work` beside everything else; it is cancelled when the server stops.
        """
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """
        Drop every client and end every task; nothing is left behind.
        """
        open_ones = list(self.connections)
        for connection in open_ones:
            connection.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(connection.lost for connection in open_ones))


@asynccontextmanager
async def serve(
    handler: Callable[[Exchange], Awaitable[None]],
    *,
    host: str,
    port: int,
    clock: Callable[[], float],
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """
    Listen until the block ends.

    Args:
        handler: called once for each request.
        host: a loopback address, or "localhost".
        port: 0 for any free one.
        clock: seconds; stamps the moment a client leaves.
        ssl_context: for https.

    Yields:
        The URL, without a slash at the end.

    Raises:
        SandboxError: the host is not loopback, or the port cannot be had.
    """
    require_loopback(host)
    scheme = "https" if ssl_context else "http"
    server = _Server(handler, scheme=scheme, clock=clock)
    listener = await _listen(server, host, port, ssl_context)
    bound_port = listener.sockets[0].getsockname()[1]
    try:
        yield f"{scheme}://{_bracketed(host)}:{bound_port}"
    finally:
        listener.close()
        await server.stop()


async def _listen(
    server: _Server, host: str, port: int, ssl_context: ssl.SSLContext | None
) -> asyncio.Server:
    try:
        return await server.loop.create_server(
            lambda: Connection(server),
            "127.0.0.1" if host == "localhost" else host,  # one socket, so one port
            port,
            ssl=ssl_context,
            backlog=BACKLOG,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if ssl_context else None,
        )
    except OSError as error:
        reason = error.strerror or error
        raise SandboxError(f"The sandbox cannot listen on {host}:{port}: {reason}.") from error


def require_loopback(host: str) -> None:
    """
    Raises:
        SandboxError: others than this machine could reach `host`.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SandboxError(
            f"The sandbox listens on loopback only (127.0.0.1, ::1 or localhost), not on {host!r}:"
            " it hands out tokens to anybody who asks."
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

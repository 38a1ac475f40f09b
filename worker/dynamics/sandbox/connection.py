"""
One client's connection: bytes in, requests out, and every way of answering them.

    socket ── Connection ── h11 ── Exchange ── handler
              (bytes)      (grammar)  (one request and what is done about it)

A ready-made server always tries to answer well. This one must also be able to answer
badly: byte by byte, half, not at all, or with a reset. So a handler is not a function
from request to response: it is given an `Exchange` and acts on it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import struct
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol, cast

import h11
from typing_extensions import override

from worker.dynamics.sandbox.messages import MAX_BODY_BYTES, Request, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

log = logging.getLogger(__name__)

MISSING_BYTES = 64  # what a truncated answer promises and does not send
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds


class Exchange:
    """
    One request and the ways of dealing with it.

    A handler calls one of `send`, `drip`, `truncate`, `garble`, `reset` or `hold`, once.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self.request = request

    @property
    def gone_at(self) -> float | None:
        """
        When the client left (seconds of the server's clock), or None if it is still there.
        """
        return self._connection.gone_at

    async def pause(self, seconds: float) -> bool:
        """
        Wait, but not for a client that leaves.

        Returns:
            Whether the client is still there.
        """
        if self.gone_at is None and seconds > 0:
            await asyncio.wait({self._connection.gone}, timeout=seconds)
        return self.gone_at is None

    async def outlast(self, seconds: float) -> None:
        """
        Wait, whether or not the client leaves.
        """
        await asyncio.sleep(seconds)

    async def hold(self) -> None:
        """
        Say nothing until the client leaves.
        """
        await asyncio.wait({self._connection.gone})

    async def send(self, response: Response) -> None:
        """
        Answer as one should.
        """
        await self._connection.write(self._connection.encode(response))

    async def drip(self, response: Response, *, seconds: float) -> None:
        """
        Answer one byte every so many seconds, until the end or until the client leaves.
        """
        for byte in self._connection.encode(response):
            await self._connection.write(bytes((byte,)))
            if not await self.pause(seconds):
                return

    async def truncate(self, response: Response) -> None:
        """
        Promise `MISSING_BYTES` more than are sent, then close.
        """
        await self._connection.write(self._connection.encode(response, missing=MISSING_BYTES))

    async def garble(self, data: bytes) -> None:
        """
        Send bytes that are no answer, then close.
        """
        await self._connection.write(data)

    def reset(self) -> None:
        """
        Reset the connection (RST, not FIN): the client loses what it has not read.
        """
        self._connection.reset()


class Host(Protocol):
    """
    What a connection needs of the server it belongs to.
    """

    handler: Callable[[Exchange], Awaitable[None]]
    scheme: str
    clock: Callable[[], float]
    loop: asyncio.AbstractEventLoop
    connections: set[Connection]

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """
        Run `work` beside everything else, until the server stops.
        """


class Connection(asyncio.Protocol):
    """
    One client's connection: requests one after the other, each handled by a task.
    """

    transport: asyncio.Transport  # from connection_made on
    _head: h11.Request  # of the request that is being read or answered

    def __init__(self, server: Host) -> None:
        self._server = server
        self._parser = h11.Connection(h11.SERVER)
        self._body = bytearray()
        self._oversized = False
        self._busy = False
        self._head_only = False
        self._writable = asyncio.Event()
        self._writable.set()
        self.gone_at: float | None = None
        self.gone: asyncio.Future[None] = server.loop.create_future()
        self.lost: asyncio.Future[None] = server.loop.create_future()

    # What asyncio tells us

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._parser.receive_data(data)
        self._read()

    @override
    def eof_received(self) -> None:
        self._note_gone()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._note_gone()
        self._writable.set()
        self._server.connections.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)

    @override
    def pause_writing(self) -> None:
        self._writable.clear()

    @override
    def resume_writing(self) -> None:
        self._writable.set()

    def _note_gone(self) -> None:
        if not self.gone.done():
            self.gone_at = self._server.clock()
            self.gone.set_result(None)

    # From bytes to requests

    def _read(self) -> None:
        try:
            while not self._busy and self._take(self._parser.next_event()):
                pass
        except h11.RemoteProtocolError as error:
            self._refuse(error)

    def _take(self, event: object) -> bool:
        match event:
            case h11.Request():
                self._begin(event)
            case h11.Data():
                self._collect(event)
            case h11.EndOfMessage():
                self._dispatch()
            case _:  # more bytes are needed, or the other side has closed
                return False
        return True

    def _begin(self, head: h11.Request) -> None:
        self._head, self._oversized = head, False
        self._head_only = head.method == b"HEAD"
        self._body.clear()
        if self._parser.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            self.transport.write(self._parser.send(go_on) or b"")

    def _collect(self, piece: h11.Data) -> None:
        if len(self._body) + len(piece.data) > MAX_BODY_BYTES:
            self._oversized = True
        if self._oversized:
            self._body.clear()
        else:
            self._body += piece.data

    def _dispatch(self) -> None:
        headers: dict[str, str] = {}
        for name, value in self._head.headers:
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        request = Request(
            method=self._head.method.decode("ascii"),
            target=self._head.target.decode("latin-1"),
            headers=headers,
            body=bytes(self._body),
            oversized=self._oversized,
            scheme=self._server.scheme,
        )
        self._busy = True
        self._server.spawn(self._converse(Exchange(self, request)))

    async def _converse(self, exchange: Exchange) -> None:
        try:
            await self._server.handler(exchange)
        except Exception:
            log.exception("The sandbox itself failed on %s.", exchange.request.path)
            self.reset()
        self._next()

    def _next(self) -> None:
        if self._parser.our_state is h11.DONE and self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()
            self._busy = False
            self._read()
        else:
            self.transport.close()

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        self._busy = True
        if self._parser.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            text = Response(status=error.error_status_hint, body=f"{error}\n".encode())
            self.transport.write(self.encode(text))
        self.transport.close()

    # From responses to bytes

    def encode(self, response: Response, *, missing: int = 0) -> bytes:
        """
        The bytes of an answer; with `missing`, of one whose Content-Length is a lie.
        """
        parts = [self._parser.send(_head(response, missing))]
        if response.body and not self._head_only:
            parts.append(self._parser.send(h11.Data(data=response.body)))
        if not missing:
            parts.append(self._parser.send(h11.EndOfMessage()))
        return b"".join(part or b"" for part in parts)

    async def write(self, data: bytes) -> None:
        """
        Hand bytes to the socket and wait until it has room for more.
        """
        if self.gone_at is None:
            self.transport.write(data)
            await self._writable.wait()

    def reset(self) -> None:
        """
        Close with RST.
        """
        plug: socket.socket = self.transport.get_extra_info("socket")
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.transport.abort()


def _head(response: Response, missing: int) -> h11.Response:
    headers = [*response.headers, ("Date", _date(int(time.time())))]
    if response.status != HTTPStatus.NO_CONTENT:
        headers.append(("Content-Length", str(len(response.body) + missing)))
    return h11.Response(
        status_code=response.status,
        headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in headers],
        reason=_reason(response.status).encode("ascii"),
    )


@functools.lru_cache(maxsize=1)
def _date(epoch_seconds: int) -> str:
    return formatdate(epoch_seconds, usegmt=True)


@functools.lru_cache
def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # a fault may order any number
        return "Unassigned"

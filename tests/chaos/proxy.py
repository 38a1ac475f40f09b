"""
A TCP proxy on loopback that breaks a line as ordered: between a worker and PostgreSQL, or
between a worker and Dynamics (plain HTTP/1.1).

                                    HalfOpen("requests"), Late
                                                │
              │                  ┌── requests ──┼────────► │
    client ───┼─► accept ───► a link                       │ server
              │                  └◄─── answers ──┼──────── │
              │                                  │
      Refuse, Reset,          HalfOpen("answers"), Partial, LoseReply
      Blackhole

    Latency and Blackhole stand on both ways of every link; Reset and `cut` end links.

An order stands until it is used up (`times`) or `heal` calls all off. What waits behind a
black hole is lost and not merely late, so healing ends those links. A client whose server is
away is reset: to be refused, it needs `Refuse`.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

CHUNK = 65536
MEMORY = 1024
"""Bytes of what was said that are kept, to find words which came in two pieces."""

HOST = "127.0.0.1"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time at all; closing then sends RST."""

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)

Way = Literal["requests", "answers"]


# ------------------------------------------------------------------------------- faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """
    Each chunk is this much later, on both ways; `times` counts chunks.
    """

    seconds: float
    jitter: float = 0.0
    times: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blackhole:
    """
    Nothing passes, not even the end of a connection; TCP stays alive, and new connections
    are accepted into silence.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfOpen:
    """
    A black hole on one way only.
    """

    lost: Way = "answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """
    Nobody listens; what is connected stays so. Counted once, the kernel does the refusing.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """
    RST to both sides of every connection there is, and of every new one.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """
    A link passes so many bytes more towards its client, then both sides are reset; `times`
    counts links.
    """

    bytes: int
    times: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseReply:
    """
    What was asked happens, and the client is reset instead of being told.

    Args:
        after: words of the request. They need not be those that take effect: after
            `b"outbox.events"` the next COMMIT of that connection is lost.
        shown_by: words of which one is in the answer when the request took effect. What
            the server says before that passes.
    """

    after: bytes
    shown_by: tuple[bytes, ...] = (b"COMMIT\0", b"HTTP/1.")
    times: int | None = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """
    An HTTP request that reaches the server when its client has long gone.

    Args:
        after: words of the request.
        client: is cut off at once, or gets no answer until it hangs up.
    """

    after: bytes
    seconds: float
    client: Literal["cut", "silent"] = "cut"
    times: int | None = 1


Fault = Latency | Blackhole | HalfOpen | Refuse | Reset | Partial | LoseReply | Late
Kind = TypeVar("Kind", bound=Fault)


@dataclass(slots=True, eq=False)
class _Order:
    fault: Fault
    left: int | None


# -------------------------------------------------------------------------------- links


@dataclass(slots=True, eq=False)
class _Link:
    """
    A client, its server, and what is known about their talk.

    Attributes:
        said: the end of what was said, by the way it went.
        replied: the server spoke last, so what the client says next begins a request.
        losing: the answer that shows its effect will be lost.
        passed: bytes towards the client since an order of `Partial`.
        swallowed: something was, so the talk can never go on.
        abrupt: whether it ends with RST.
    """

    client: socket.socket
    server: socket.socket | None = None
    said: dict[Way, bytes] = field(default_factory=lambda: {"requests": b"", "answers": b""})
    replied: bool = True
    losing: _Order | None = None
    passed: Counter[_Order] = field(default_factory=Counter)
    swallowed: bool = False
    abrupt: bool = True

    def says(self, way: Way, chunk: bytes, *words: bytes) -> bool:
        """
        Whether this chunk holds, or completes, one of the words.
        """
        before = self.said[way]
        text = before + chunk
        return any(text.find(word, max(0, len(before) - len(word) + 1)) >= 0 for word in words)

    def remember(self, way: Way, chunk: bytes) -> None:
        """
        Keep the end of it.
        """
        self.said[way] = (self.said[way] + chunk[-MEMORY:])[-MEMORY:]

    def close(self) -> None:
        """
        Close both sides.
        """
        for side in (self.client, self.server):
            if side is not None:
                _close(side, abrupt=self.abrupt)


# -------------------------------------------------------------------------------- proxy


class Proxy:
    """
    Listens on loopback and passes everything on to its target, unless ordered otherwise.

    Attributes:
        target: where the server is: a host, or the folder of its socket as libpq writes it,
            and a port. Looked at for each new connection.
        port: where clients find it.
        used: how often each kind of fault acted: on chunks for latency, on links for the
            others, on requests that arrived for late ones.
    """

    def __init__(self, target: tuple[str, int], luck: random.Random) -> None:
        self.target = target
        self.used: Counter[type[Fault]] = Counter()
        self._luck = luck
        self._orders: list[_Order] = []
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        # Bound and silent: while nobody listens, nobody else gets the port either.
        self._place = _bound(0)
        self.port: int = self._place.getsockname()[1]
        self._listener: socket.socket | None = None
        self._listen()

    # ------------------------------------------------------------------ from outside

    @property
    def under_way(self) -> int:
        """
        How many late requests have yet to be answered.
        """
        return len(self._late)

    @property
    def connections(self) -> int:
        """
        How many links there are.
        """
        return len(self._links)

    def order(self, fault: Fault) -> None:
        """
        Let this happen from now on.
        """
        self._orders.append(_Order(fault, getattr(fault, "times", None)))
        match fault:
            case Refuse():
                self._stop_listening()
                self.used[Refuse] += 1
            case Reset():
                self.used[Reset] += self._end_links(abrupt=True)
            case _:
                pass

    def cut(self) -> None:
        """
        Hang up on both sides of every connection.
        """
        self._end_links(abrupt=False)

    def heal(self) -> None:
        """
        Call off all orders; links that lost bytes end. Late requests stay under way.
        """
        self._orders.clear()
        for task, link in self._links.items():
            if link.swallowed:
                task.cancel()
        self._listen()

    async def close(self) -> None:
        """
        End everything.
        """
        self._stop_listening()
        self._place.close()
        tasks = [*self._links, *self._late]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._errors:
            raise BaseExceptionGroup("The proxy itself failed.", self._errors)

    # ----------------------------------------------------------------------- accept

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.listen()
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        if self._standing(Reset):
            self.used[Reset] += 1
            _close(client, abrupt=True)
            return
        _make_quick(client)
        link = _Link(client)
        task = asyncio.create_task(self._serve(link))
        self._links[task] = link
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Here, because a task that is cancelled before its first step closes nothing.
        if link := self._links.pop(task, None):
            link.close()
        self._late.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._errors.append(error)

    def _end_links(self, *, abrupt: bool) -> int:
        for task, link in self._links.items():
            link.abrupt = abrupt
            task.cancel()
        return len(self._links)

    # ------------------------------------------------------------------------- link

    async def _serve(self, link: _Link) -> None:
        try:
            await self._meet_holes(link, "requests")
            link.server = await _dial(self.target)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._carry_requests(link, link.server))
                ways.create_task(self._carry_answers(link, link.server))
            link.abrupt = False
        except* OSError:
            pass  # whatever broke on one side, the other is reset

    async def _carry_requests(self, link: _Link, server: socket.socket) -> None:
        while chunk := await _hear(link.client):
            await self._meet_latency()
            await self._meet_holes(link, "requests")
            request = await self._meet_late(link, chunk)
            link.replied = False
            self._meet_lose_reply(link, request)
            await _say(server, request)
        await self._meet_holes(link, "requests")
        server.shutdown(socket.SHUT_WR)

    async def _carry_answers(self, link: _Link, server: socket.socket) -> None:
        while chunk := await _hear(server):
            await self._meet_latency()
            await self._meet_holes(link, "answers")
            self._lose_reply(link, chunk)
            link.replied = True
            await self._meet_partial(link, chunk)
            await _say(link.client, chunk)
        await self._meet_holes(link, "answers")
        link.client.shutdown(socket.SHUT_WR)

    # ----------------------------------------------------------------------- faults

    def _standing(self, kind: type[Kind]) -> list[tuple[_Order, Kind]]:
        return [(order, order.fault) for order in self._orders if isinstance(order.fault, kind)]

    def _use(self, order: _Order) -> None:
        """
        Count that an order acted, and strike it off if that was the last time.
        """
        self.used[type(order.fault)] += 1
        self._strike(order)

    def _strike(self, order: _Order) -> None:
        if order.left is not None and order in self._orders:
            order.left -= 1
            if not order.left:
                self._orders.remove(order)

    async def _meet_latency(self) -> None:
        for order, fault in self._standing(Latency):
            self._use(order)
            await asyncio.sleep(fault.seconds + self._luck.uniform(0, fault.jitter))

    async def _meet_holes(self, link: _Link, way: Way) -> None:
        """
        If what goes this way is swallowed, wait until somebody ends the link.
        """
        for order in self._orders:
            if order.fault in {Blackhole(), HalfOpen(lost=way)}:
                if not link.swallowed:
                    self._use(order)
                link.swallowed = True
                await asyncio.get_running_loop().create_future()

    async def _meet_partial(self, link: _Link, chunk: bytes) -> None:
        for order, fault in self._standing(Partial):
            rest = fault.bytes - link.passed[order]
            if len(chunk) >= rest:
                self._use(order)
                await _say(link.client, chunk[:rest])
                _cut_off()
            link.passed[order] += len(chunk)

    def _meet_lose_reply(self, link: _Link, request: bytes) -> None:
        for order, fault in self._standing(LoseReply):
            if link.says("requests", request, fault.after):
                link.losing = order
        link.remember("requests", request)

    def _lose_reply(self, link: _Link, answer: bytes) -> None:
        for order, fault in self._standing(LoseReply):
            if order is link.losing and link.says("answers", answer, *fault.shown_by):
                self._use(order)
                _cut_off()
        link.remember("answers", answer)

    async def _meet_late(self, link: _Link, request: bytes) -> bytes:
        """
        While one stands, requests go on whole; the one that is meant goes on later.
        """
        if not link.replied or not self._standing(Late):
            return request
        while not _is_whole(request):
            request += await _hear(link.client) or _cut_off()
        for order, fault in self._standing(Late):
            if fault.after in request:
                self._strike(order)
                self._post(self._deliver_late(request, fault))
                link.swallowed = True
                while fault.client == "silent" and await _hear(link.client):
                    pass
                _cut_off()
        return request

    async def _deliver_late(self, request: bytes, fault: Late) -> None:
        """
        On a connection of its own, which is kept until the server has answered.
        """
        await asyncio.sleep(fault.seconds)
        with suppress(OSError):  # a server that is away never gets it
            server = await _dial(self.target)
            with server:
                await _say(server, request)
                if await _hear(server):
                    self.used[Late] += 1

    def _post(self, delivery: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(delivery)
        self._late.add(task)
        task.add_done_callback(self._ended)


@asynccontextmanager
async def listening(
    host: str, port: int, *, luck: random.Random | None = None
) -> AsyncIterator[Proxy]:
    """
    A proxy before a server, until the block ends.

    Args:
        host: or the folder of its socket, as libpq writes it.
        luck: what jitter is drawn from.
    """
    proxy = Proxy((host, port), luck or random.Random(0))  # noqa: S311 (no secret)
    try:
        yield proxy
    finally:
        await proxy.close()


# ------------------------------------------------------------------------------ sockets


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(0)
    listener.bind((HOST, port))
    return listener


async def _dial(target: tuple[str, int]) -> socket.socket:
    """
    Connect to a server.

    Raises:
        OSError: it is not there.
    """
    host, port = target
    local = host.startswith("/")
    server = socket.socket(socket.AF_UNIX if local else socket.AF_INET)
    try:
        _make_quick(server)
        address = f"{host}/.s.PGSQL.{port}" if local else target
        await asyncio.get_running_loop().sock_connect(server, address)
    except BaseException:
        server.close()
        raise
    return server


def _make_quick(side: socket.socket) -> None:
    """
    Nothing waits: neither we for the socket, nor small packets for big ones.
    """
    side.settimeout(0)
    if side.family != socket.AF_UNIX:
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _hear(side: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(side, CHUNK)


async def _say(side: socket.socket, chunk: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(side, chunk)


def _close(side: socket.socket, *, abrupt: bool) -> None:
    if abrupt:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    side.close()


def _cut_off() -> NoReturn:
    raise ConnectionResetError("As ordered.")


def _is_whole(request: bytes) -> bool:
    """
    Whether the head of an HTTP request is complete, and the body that it promises.
    """
    head, end, body = request.partition(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(head)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)

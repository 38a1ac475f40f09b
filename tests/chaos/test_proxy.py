"""
The proxy: each fault against a real peer, and what a worker's own code makes of it.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.chaos.proxy import (
    Blackhole,
    HalfOpen,
    Late,
    Latency,
    LoseReply,
    Partial,
    Proxy,
    Refuse,
    Reset,
    listening,
)
from tests.conftest import until
from worker import database
from worker.database import transaction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.chaos.proxy import Fault

    Commit = Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]]

# --------------------------------------------------------------------------------- peers


class Peer:
    """
    A server that answers each piece it hears, once the piece is whole.

    Attributes:
        heard: every piece, in order.
        answered: how many answers are on their way, whole.
        ended: how many connections have ended.
        held: while it is clear, nothing is answered.
    """

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self._tasks: set[asyncio.Task[Any]] = set()
        self.heard: list[bytes] = []
        self.answered = 0
        self.ended = 0
        self.held = asyncio.Event()
        self.held.set()
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while piece := await reader.readuntil(b"\n"):
                self.heard.append(piece)
                await self.held.wait()
                writer.write(self._answer(piece))
                await writer.drain()
                self.answered += 1
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended += 1
            writer.close()
            self._tasks.discard(task)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Peer]:
        """
        Serve until the block ends.
        """
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.held.set()
            await until(lambda: not self._tasks)


class Client:
    """
    A client that sees what the kernel sees: bytes, an end, a reset.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket()
        self._socket.settimeout(0)

    async def connect(self) -> None:
        """
        Connect.
        """
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", self._port))

    async def say(self, piece: bytes) -> None:
        """
        Send it.
        """
        await asyncio.get_running_loop().sock_sendall(self._socket, piece)

    async def hear(self) -> bytes:
        """
        What comes next; nothing is the end.
        """
        return await asyncio.get_running_loop().sock_recv(self._socket, 65536)

    async def ask(self, piece: bytes) -> bytes:
        """
        Send it, and hear the answer.
        """
        await self.say(piece)
        return await self.hear()

    async def is_reset(self) -> bool:
        """
        Whether what comes next is a reset, not an orderly end.
        """
        try:
            await self.hear()
        except ConnectionResetError:
            return True
        return False

    def hang_up(self) -> None:
        """
        Close.
        """
        self._socket.close()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    """
    A client that is connected until the block ends.
    """
    client = Client(port)
    try:
        await client.connect()
        yield client
    finally:
        client.hang_up()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """
    A server that says again whatever line it hears.
    """
    async with Peer(lambda piece: piece).listening() as peer:
        yield peer


@pytest.fixture
async def proxy(peer: Peer) -> AsyncIterator[Proxy]:
    """
    A proxy before it.
    """
    async with listening("127.0.0.1", peer.port) as proxy:
        yield proxy
    gc.collect()  # a socket left open would warn here, and warnings are errors


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    """
    A client that has come through the proxy before.
    """
    async with connected(proxy.port) as client:
        assert await client.ask(b"hello\n") == b"hello\n"
        yield client


async def fails_to_hear(client: Client) -> bool:
    """
    Whether a client with a deadline of its own gives up.
    """
    try:
        async with asyncio.timeout(0.1):
            await client.hear()
    except TimeoutError:
        return True
    return False


# -------------------------------------------------------------------------- without fault


async def test_what_is_said_passes_whole_and_in_order(client: Client) -> None:
    """
    Both ways at once, and more than the buffers on the way hold.
    """
    said = b"".join(str(number).encode() * 10_000 + b"\n" for number in range(500))
    saying = asyncio.create_task(client.say(said))
    heard = bytearray()

    while len(heard) < len(said):
        heard += await client.hear()

    await saying
    assert heard == said


async def test_the_end_of_one_side_is_the_end_of_the_other(
    client: Client, peer: Peer, proxy: Proxy
) -> None:
    """
    In an orderly way, and nothing is left of the link.
    """
    client.hang_up()

    await until(lambda: peer.ended == 1 and proxy.connections == 0)


async def test_a_server_that_is_away_resets_and_may_come_back_elsewhere(
    proxy: Proxy, peer: Peer
) -> None:
    """
    Each new connection looks for the target anew.
    """
    proxy.target = ("127.0.0.1", 9)
    async with connected(proxy.port) as client:
        assert await client.is_reset()

    proxy.target = ("127.0.0.1", peer.port)
    async with connected(proxy.port) as client:
        assert await client.ask(b"back\n") == b"back\n"


async def test_a_server_that_says_much_waits_for_a_slow_client(proxy: Proxy) -> None:
    """
    The proxy holds a chunk and no more.
    """
    size = 50_000_000
    async with Peer(lambda _: b"x" * size).listening() as talker:
        proxy.target = ("127.0.0.1", talker.port)
        async with connected(proxy.port) as client:
            heard = len(await client.ask(b"talk\n"))
            assert talker.answered == 0
            while heard < size:
                heard += len(await client.hear())
            await until(lambda: talker.answered == 1)


# --------------------------------------------------------------------- latency and silence


async def test_latency_delays_both_ways(client: Client, proxy: Proxy) -> None:
    """
    By at least what was ordered, each.
    """
    proxy.order(Latency(seconds=0.05, jitter=0.01))
    loop = asyncio.get_running_loop()
    began = loop.time()

    assert await client.ask(b"slow\n") == b"slow\n"

    assert loop.time() - began >= 0.1
    assert proxy.used == {Latency: 2}


async def test_latency_may_end_by_itself(client: Client, proxy: Proxy) -> None:
    """
    After so many chunks.
    """
    proxy.order(Latency(seconds=0.01, times=3))

    for _ in range(4):
        await client.ask(b"slow\n")

    assert proxy.used == {Latency: 3}


async def test_a_black_hole_keeps_the_connection_and_passes_nothing(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    Neither bytes nor the end: the client gives up by itself, and the server never knows.
    """
    proxy.order(Blackhole())

    await client.say(b"lost\n")
    assert await fails_to_hear(client)
    client.hang_up()
    await until(lambda: proxy.used[Blackhole] == 1)

    assert (peer.heard, peer.ended, proxy.connections) == ([b"hello\n"], 0, 1)


async def test_a_black_hole_takes_the_answer_to_what_was_asked_before(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    It begins between question and answer.
    """
    peer.held.clear()
    await client.say(b"asked\n")
    await until(lambda: peer.heard[-1] == b"asked\n")

    proxy.order(Blackhole())
    peer.held.set()

    assert await fails_to_hear(client)
    assert proxy.used == {Blackhole: 1}


async def test_a_black_hole_accepts_new_connections_into_silence(proxy: Proxy, peer: Peer) -> None:
    """
    The client is connected, the server knows nothing of it.
    """
    proxy.order(Blackhole())

    async with connected(proxy.port) as client:
        await client.say(b"lost\n")
        assert await fails_to_hear(client)

    assert (peer.heard, peer.ended) == ([], 0)


async def test_healing_ends_what_lost_bytes_and_nothing_else(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    A connection that was idle all the while goes on, as it would in a real network.
    """
    async with connected(proxy.port) as talker:
        await talker.ask(b"hello\n")
        proxy.order(Blackhole())
        await talker.say(b"lost\n")
        await until(lambda: proxy.used[Blackhole] == 1)

        proxy.heal()

        assert await talker.is_reset()
    assert await client.ask(b"still here\n") == b"still here\n"
    async with connected(proxy.port) as newcomer:
        assert await newcomer.ask(b"new\n") == b"new\n"


async def test_half_open_lets_requests_through_and_no_answer(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    What was asked happens.
    """
    proxy.order(HalfOpen())

    await client.say(b"do it\n")

    assert await fails_to_hear(client)
    assert peer.heard == [b"hello\n", b"do it\n"]
    assert proxy.used == {HalfOpen: 1}


async def test_half_open_the_other_way_lets_answers_through_and_no_request(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    An answer to what was asked before comes; what is asked now never arrives.
    """
    peer.held.clear()
    await client.say(b"before\n")
    await until(lambda: peer.heard[-1] == b"before\n")
    proxy.order(HalfOpen(lost="requests"))

    await client.say(b"after\n")
    peer.held.set()

    assert await client.hear() == b"before\n"
    assert await fails_to_hear(client)
    assert b"after\n" not in peer.heard


# ------------------------------------------------------------------- refusals and resets


async def test_refused_until_it_is_healed_on_the_same_port(client: Client, proxy: Proxy) -> None:
    """
    New connections only.
    """
    proxy.order(Refuse())
    with pytest.raises(ConnectionRefusedError):
        async with connected(proxy.port):
            pass
    assert await client.ask(b"still here\n") == b"still here\n"

    proxy.heal()

    async with connected(proxy.port) as newcomer:
        assert await newcomer.ask(b"new\n") == b"new\n"
    assert proxy.used == {Refuse: 1}


async def test_nobody_else_gets_the_port_of_a_proxy_that_refuses(proxy: Proxy) -> None:
    """
    Neither by asking for it nor by chance: it has to be there for healing.
    """
    proxy.order(Refuse())

    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", proxy.port))


async def test_a_reset_hits_what_is_there_and_what_comes(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    Both sides, until it is healed.
    """
    proxy.order(Reset())

    assert await client.is_reset()
    await until(lambda: peer.ended == 1)
    with pytest.raises(ConnectionResetError):
        async with connected(proxy.port) as newcomer:
            await newcomer.ask(b"new\n")
    assert proxy.used == {Reset: 2}

    proxy.heal()
    async with connected(proxy.port) as newcomer:
        assert await newcomer.ask(b"new\n") == b"new\n"


async def test_a_cut_ends_all_connections_in_an_orderly_way(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    Once: new ones are welcome.
    """
    proxy.cut()

    assert await client.hear() == b""
    await until(lambda: peer.ended == 1)
    async with connected(proxy.port) as newcomer:
        assert await newcomer.ask(b"new\n") == b"new\n"


@pytest.mark.parametrize("size", [0, 3, 12])
async def test_a_part_of_the_answers_passes_and_then_a_reset(
    client: Client, proxy: Proxy, size: int
) -> None:
    """
    To the byte, over as many answers as it takes.
    """
    proxy.order(Partial(bytes=size, times=1))
    heard = b""

    async def talk() -> bytes:
        nonlocal heard
        while True:
            await client.say(b"12345678\n")
            heard += await client.hear()

    with pytest.raises(ConnectionResetError):
        await talk()

    assert len(heard) == size
    assert proxy.used == {Partial: 1}
    async with connected(proxy.port) as newcomer:
        assert await newcomer.ask(b"whole again\n") == b"whole again\n"


@pytest.mark.parametrize("fault", [Blackhole(), HalfOpen(), Refuse(), Reset(), Latency(seconds=9)])
async def test_a_proxy_ends_in_the_middle_of_any_fault(
    peer: Peer, fault: Fault, recwarn: pytest.WarningsRecorder
) -> None:
    """
    No task, no socket, no port is left.
    """
    tasks = asyncio.all_tasks()
    async with listening("127.0.0.1", peer.port) as proxy, connected(proxy.port) as client:
        await client.ask(b"hello\n")
        proxy.order(fault)
        if not isinstance(fault, Reset):
            await client.say(b"lost\n")
            await until(lambda: proxy.used[type(fault)] == 1)

    await until(lambda: peer.ended == 1)
    assert asyncio.all_tasks() <= tasks
    assert proxy.connections == 0
    with pytest.raises(ConnectionRefusedError):
        async with connected(proxy.port):
            pass
    gc.collect()
    assert list(recwarn) == []


# ----------------------------------------------------------------------------- lost replies


async def test_a_reply_is_lost_when_the_request_is_split(proxy: Proxy, peer: Peer) -> None:
    """
    The words come in two pieces, and the server has answered before the client is reset.
    """
    proxy.order(LoseReply(after=b"COMMIT", shown_by=(b"\n",)))
    peer.held.clear()
    async with connected(proxy.port) as client:
        await client.say(b"I COM")
        await until(lambda: proxy.connections)
        await client.say(b"MIT\n")
        await until(lambda: peer.heard == [b"I COMMIT\n"])
        assert not proxy.used[LoseReply]

        peer.held.set()

        assert await client.is_reset()
    assert proxy.used == {LoseReply: 1}


async def test_only_so_many_replies_are_lost(proxy: Proxy) -> None:
    """
    The next one is told.
    """
    proxy.order(LoseReply(after=b"COMMIT", shown_by=(b"\n",), times=2))
    for _ in range(2):
        async with connected(proxy.port) as client:
            await client.say(b"COMMIT\n")
            assert await client.is_reset()

    async with connected(proxy.port) as client:
        assert await client.ask(b"COMMIT\n") == b"COMMIT\n"
    assert proxy.used == {LoseReply: 2}


async def test_an_order_that_was_called_off_loses_nothing(
    client: Client, proxy: Proxy, peer: Peer
) -> None:
    """
    Also when the request had already met it.
    """
    proxy.order(LoseReply(after=b"COMMIT", shown_by=(b"\n",)))
    peer.held.clear()
    await client.say(b"COMMIT\n")
    await until(lambda: peer.heard[-1] == b"COMMIT\n")

    proxy.heal()
    peer.held.set()

    assert await client.hear() == b"COMMIT\n"


# ------------------------------------------------------------------------- and PostgreSQL


@pytest.fixture
async def line(database_url: str) -> AsyncIterator[Proxy]:
    """
    A proxy before the tests' database, which may listen on a socket.
    """
    known = conninfo_to_dict(database_url)
    async with listening(str(known["host"]), int(known.get("port") or 5432)) as proxy:
        yield proxy
    gc.collect()


@pytest.fixture
def near(database_url: str, line: Proxy) -> str:
    """
    The address of the database, through the proxy.
    """
    url = make_url(database_url).set(host="127.0.0.1", port=line.port, query={})
    return url.render_as_string(hide_password=False)


@pytest.fixture
async def near_engine(near: str, line: Proxy) -> AsyncIterator[AsyncEngine]:
    """
    An engine like the worker's, connected through the proxy.
    """
    engine = database.connect(near, application_name="near", pool_size=2)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    yield engine
    line.heal()
    await engine.dispose()


ADD = "INSERT INTO public.organizations (id, name) VALUES (gen_random_uuid(), 'Added')"


async def added(engine: AsyncEngine) -> int:
    """
    How many rows stayed, seen without the proxy.
    """
    async with engine.connect() as connection:
        result = await connection.execute(
            text("SELECT count(*) FROM public.organizations WHERE name = 'Added'")
        )
        return int(result.scalar_one())


async def add(engine: AsyncEngine) -> None:
    """
    A transaction like the worker's.
    """
    async with transaction(engine) as connection:
        await connection.execute(text(ADD))


async def simply(connection: psycopg.AsyncConnection[Any]) -> None:
    """
    COMMIT as psycopg itself sends it.
    """
    await connection.execute(ADD)
    await connection.commit()


async def prepared(connection: psycopg.AsyncConnection[Any]) -> None:
    """
    COMMIT as a prepared statement: its execution does not repeat the word.
    """
    await connection.execute(ADD)
    await connection.execute("COMMIT", prepare=True)


async def in_binary(connection: psycopg.AsyncConnection[Any]) -> None:
    """
    COMMIT in the extended protocol, all of it at once.
    """
    await connection.execute(ADD)
    await connection.execute("COMMIT", binary=True)


async def in_a_pipeline(connection: psycopg.AsyncConnection[Any]) -> None:
    """
    COMMIT behind other statements, whose answers come first.
    """
    async with connection.pipeline():
        await connection.execute("SELECT repeat('x', 100000)")
        await connection.execute(ADD)
        await connection.commit()


@pytest.mark.parametrize("commit", [simply, prepared, in_binary, in_a_pipeline])
async def test_a_commit_whose_answer_is_lost_is_a_commit(
    engine: AsyncEngine, line: Proxy, near: str, commit: Commit
) -> None:
    """
    The client gets an error that tells nothing, whichever way it asked.
    """
    connection = await psycopg.AsyncConnection.connect(near)
    line.order(LoseReply(after=b"COMMIT"))

    with pytest.raises(psycopg.OperationalError) as error:
        await commit(connection)

    assert error.value.sqlstate is None
    assert connection.broken
    await connection.close()
    assert await added(engine) == 1
    assert line.used == {LoseReply: 1}


async def test_the_commit_after_a_given_statement_can_be_chosen(
    engine: AsyncEngine, line: Proxy, near: str
) -> None:
    """
    Another transaction on the same line is told of its own.
    """
    connection = await psycopg.AsyncConnection.connect(near)
    line.order(LoseReply(after=b"INSERT INTO public.organizations"))
    await connection.execute("SELECT pg_current_xact_id()")
    await connection.commit()

    with pytest.raises(psycopg.OperationalError):
        await simply(connection)

    await connection.close()
    assert await added(engine) == 1


async def test_a_transaction_whose_commit_answer_is_lost_is_a_success(
    engine: AsyncEngine, line: Proxy, near_engine: AsyncEngine
) -> None:
    """
    It is looked up on a new connection, through the same line.
    """
    line.order(LoseReply(after=b"COMMIT"))

    await add(near_engine)

    assert await added(engine) == 1
    assert line.used == {LoseReply: 1}


@pytest.mark.parametrize("fault", [Blackhole(), HalfOpen(), HalfOpen(lost="requests")])
async def test_a_database_that_falls_silent_is_left_at_our_own_deadline(
    engine: AsyncEngine,
    line: Proxy,
    near_engine: AsyncEngine,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    """
    TCP is alive and nothing comes; after healing, the next transaction has a line.
    """
    monkeypatch.setattr(database, "TRANSACTION_SECONDS", 0.5)

    async def fall_silent() -> None:
        async with transaction(near_engine) as connection:
            await connection.execute(text("SELECT 1"))
            line.order(fault)
            await connection.execute(text(ADD))

    falling = asyncio.create_task(fall_silent())
    # The second one is psycopg's request to cancel, which would take ten seconds to give up.
    await until(lambda: line.used[type(fault)] == 2)
    line.heal()
    with pytest.raises(TimeoutError):
        await falling

    await add(near_engine)
    assert await added(engine) == 1


async def test_a_database_that_is_silent_from_the_start_is_left_at_our_own_deadline(
    line: Proxy, near: str
) -> None:
    """
    It was connected to, so no refusal comes.
    """
    line.order(Blackhole())

    with pytest.raises(psycopg.errors.ConnectionTimeout):
        await psycopg.AsyncConnection.connect(near, connect_timeout=2)


@pytest.mark.parametrize("fault", [Reset(), Refuse(), Partial(bytes=100)])
async def test_a_database_whose_line_breaks_is_back_when_it_is_healed(
    engine: AsyncEngine, line: Proxy, near: str, near_engine: AsyncEngine, fault: Fault
) -> None:
    """
    Each transaction happened or raised.
    """
    line.order(fault)
    line.cut()
    with pytest.raises(psycopg.OperationalError):
        await psycopg.AsyncConnection.connect(near)
    line.heal()

    await add(near_engine)

    assert await added(engine) == 1


# ---------------------------------------------------------------------------------- and HTTP

ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.fixture
async def portal() -> AsyncIterator[Peer]:
    """
    A server to which the last line of a request is its body, and which knows one answer.
    """
    async with Peer(lambda piece: ANSWER if piece == BODY else b"").listening() as portal:
        yield portal


@pytest.fixture
async def road(portal: Peer) -> AsyncIterator[Proxy]:
    """
    A proxy before it.
    """
    async with listening("127.0.0.1", portal.port) as proxy:
        yield proxy
    gc.collect()


BODY = b'{"visible": false}\n'


def request(verb: str = "PATCH") -> bytes:
    """
    A request with a head and a body.
    """
    return f"{verb} /contacts HTTP/1.1\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def test_a_patch_whose_answer_is_lost_was_received(road: Proxy, portal: Peer) -> None:
    """
    Whole, and other requests on the same connection are answered.
    """
    road.order(LoseReply(after=b"PATCH "))
    async with connected(road.port) as client:
        assert await client.ask(request("POST")) == ANSWER
        await client.say(request())
        assert await client.is_reset()

    assert portal.heard[-1] == BODY
    assert road.used == {LoseReply: 1}


@pytest.mark.parametrize("way", ["cut", "silent"])
async def test_a_late_patch_arrives_when_its_client_has_gone(
    road: Proxy, portal: Peer, way: Literal["cut", "silent"]
) -> None:
    """
    Once, whole, and after what was sent later.
    """
    road.order(Late(after=b"PATCH ", seconds=0.2, client=way))
    async with connected(road.port) as client:
        await client.say(request())
        assert await (client.is_reset() if way == "cut" else fails_to_hear(client))
    await until(lambda: not road.connections)
    assert (portal.heard, road.under_way) == ([], 1)

    async with connected(road.port) as client:
        assert await client.ask(request("DELETE")) == ANSWER
    await until(lambda: not road.under_way)

    verbs = [line.split()[0] for line in portal.heard if b"HTTP" in line]
    assert verbs == [b"DELETE", b"PATCH"]
    assert portal.heard.count(BODY) == 2
    assert road.used == {Late: 1}


async def test_a_late_request_is_one_request_in_whatever_pieces_it_comes(
    road: Proxy, portal: Peer
) -> None:
    """
    What came before it on the same connection was delivered in time.
    """
    road.order(Late(after=b"PATCH ", seconds=0))
    async with connected(road.port) as client:
        assert await client.ask(request("POST")) == ANSWER
        for byte in request():
            await client.say(bytes([byte]))
            await asyncio.sleep(0)
        assert await client.is_reset()
    await until(lambda: not road.under_way)

    assert b"".join(portal.heard) == request("POST") + request()
    assert road.used == {Late: 1}


async def test_healing_does_not_call_back_what_is_under_way(road: Proxy, portal: Peer) -> None:
    """
    A slow old request is exactly what arrives when all is well again.
    """
    road.order(Late(after=b"PATCH ", seconds=0.1))
    async with connected(road.port) as client:
        await client.say(request())
        assert await client.is_reset()

    road.heal()

    await until(lambda: road.used[Late] == 1)
    assert portal.heard[-1] == BODY


async def test_a_late_request_to_a_server_that_is_away_is_lost(road: Proxy, portal: Peer) -> None:
    """
    It is no longer under way, and it does not count.
    """
    road.order(Late(after=b"PATCH ", seconds=0))
    road.target = ("127.0.0.1", 9)
    road.target = ("127.0.0.1", portal.port)
    async with connected(road.port) as client:
        assert await client.ask(request("POST")) == ANSWER
        road.target = ("127.0.0.1", 9)
        await client.say(request())
        assert await client.is_reset()

    await until(lambda: not road.under_way)
    assert not road.used[Late]


async def test_a_proxy_ends_while_a_request_is_under_way(portal: Peer) -> None:
    """
    Then it never arrives.
    """
    async with listening("127.0.0.1", portal.port) as road, connected(road.port) as client:
        road.order(Late(after=b"PATCH ", seconds=60))
        await client.say(request())
        assert await client.is_reset()
        assert road.under_way == 1

    assert (road.under_way, portal.heard) == (0, [])

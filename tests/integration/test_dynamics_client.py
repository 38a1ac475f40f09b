"""
The client over real sockets, against servers that behave badly byte by byte.

What takes a `road` holds for the Edge Function, too.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import struct
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import trustme
from structlog.testing import capture_logs
from typing_extensions import override

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from tests.integration.roads import ROADS, Credentials, Road
from worker.dynamics.client import DynamicsClient, DynamicsTarget, dynamics_client
from worker.dynamics.errors import MAX_RETRY_AFTER_SECONDS
from worker.dynamics.exchange import CONNECTIONS, Exchange
from worker.http_client import MAX_ANSWER_BYTES, HttpClient, NoAnswerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from yarl import URL

    from worker.dynamics import EdgeClient
    from worker.http_client import Answer, Outgoing, Trail

    Fields = dict[str, str]  # of a DynamicsTarget, besides its URL
    Script = Callable[[asyncio.StreamWriter], Awaitable[None]]
    Listener = Callable[[], Awaitable[None]]

ROW = UUID("00000000-0000-4000-8000-0000000000a1")
EVENT = UUID("00000000-0000-4000-8000-0000000000e1")
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
PATCH: Fields = {}
KEY: Fields = {"key": "hlf_no"}
ACTION: Fields = {"operation": "action", "action": "hlf_SetVisibility"}
GENEROUS_SECONDS = 30.0  # a deadline that no test means to meet


@pytest.fixture(params=list(ROADS))
def road(request: pytest.FixtureRequest) -> Road:
    """
    Each of the two.
    """
    return ROADS[request.param]


class Server:
    """
    A socket that reads whole requests and answers each by the next script; the last repeats.
    """

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """
        Serve one connection until either side has had enough.
        """
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                self.requests.append(await _request(reader))
                await self._next_script()(writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _next_script(self) -> Script:
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

    async def stop(self) -> None:
        """
        End every connection.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def heads(self) -> list[tuple[str, dict[str, str]]]:
        """
        Of each request, the first line and the headers, names in lower case.
        """
        return [_head(request) for request in self.requests]


async def _request(reader: asyncio.StreamReader) -> bytes:
    """
    Its head as it came, and its body, whether that came in one piece or in chunks.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    headers = _head(head)[1]
    if headers.get("transfer-encoding") != "chunked":
        return head + await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return head + body


def _head(request: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return first, {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}


@asynccontextmanager
async def serving(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """
    A `Server` on a free port of loopback.
    """
    server = Server(*scripts)
    listener = await asyncio.start_server(server.meet, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listener.close()
        await server.stop()


def says(data: bytes, *, then_close: bool = False) -> Script:
    """
    Answers with these bytes.
    """

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if then_close:
            writer.close()

    return script


def drips(data: bytes, *, for_ever: bytes) -> Script:
    """
    Answers one byte at a time and never ends; each byte comes long before any time-out.
    """

    async def script(writer: asyncio.StreamWriter) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
        while True:
            await asyncio.sleep(0.01)
            writer.write(for_ever)
            await writer.drain()

    return script


async def resets(writer: asyncio.StreamWriter) -> None:
    """
    Answers with RST.
    """
    plug = writer.get_extra_info("socket")
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def hangs(_writer: asyncio.StreamWriter) -> None:
    """
    Does not answer.
    """
    await asyncio.Event().wait()


async def hangs_up(writer: asyncio.StreamWriter) -> None:
    """
    Closes without a word.
    """
    writer.close()


def json_answer(status: str, document: object, *headers: str) -> bytes:
    """
    An answer with a JSON body.
    """
    body = json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Nobody:
    """
    Proves nothing, to anybody.
    """

    async def authorization(self, _url: URL) -> str:
        """
        The same for all.
        """
        return "Bearer nobody"

    async def another(self, _url: URL, _refused: str) -> None:
        """
        There is none.
        """


@asynccontextmanager
async def client_of(
    url: str, fields: Fields = PATCH, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[DynamicsClient]:
    """
    A client for a server without tokens.
    """
    target = DynamicsTarget(url=url, **fields)  # type: ignore[arg-type]  # strings, some literal
    async with dynamics_client(target, auth=Nobody(), tls=tls) as client:
        yield client


TOKEN = {"access_token": "a-token", "expires_in": 3600, "token_type": "Bearer"}


@asynccontextmanager
async def travelling(
    road: Road, url: str, fields: Fields = PATCH
) -> AsyncIterator[DynamicsClient | EdgeClient]:
    """
    A client for a server with tokens, which are all the same.
    """
    target = DynamicsTarget(url=url, **fields)  # type: ignore[arg-type]  # strings, some literal
    async with serving(says(json_answer("200 OK", TOKEN))) as entra:
        credentials = Credentials(authority=entra.url, resource=url, secret="a-secret")
        async with road.open(target, credentials) as opened:
            yield opened.client


async def hide(client: DynamicsClient | EdgeClient, *, seconds: float = GENEROUS_SECONDS) -> None:
    """
    One request.
    """
    await client.set_visibility(ROW, visible=False, seconds=seconds, correlation_id=EVENT)


async def failure_of(
    road: Road, *scripts: Script, fields: Fields = PATCH, seconds: float = GENEROUS_SECONDS
) -> tuple[DeliveryError, Server]:
    """
    The error that a server with these scripts causes.
    """
    async with serving(*scripts) as server, travelling(road, server.url, fields) as client:
        with pytest.raises(DeliveryError) as raised:
            await hide(client, seconds=seconds)
        return raised.value, server


async def test_a_patch_is_exactly_this_request(road: Road) -> None:
    """
    Every header, and the body to the byte; nothing that asks for data.
    """
    async with serving(says(NO_CONTENT)) as server, travelling(road, server.url) as client:
        await hide(client)
    (request,) = server.requests
    first, headers = _head(request)
    assert first == f"PATCH /api/data/v9.2/contacts({ROW}) HTTP/1.1"
    assert request.partition(b"\r\n\r\n")[2] == b'{"hlf_portalvisible":false}'
    UUID(headers.pop("x-ms-client-request-id"))
    assert headers == {
        "host": server.url.removeprefix("http://"),
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "if-match": "*",
        "odata-maxversion": "4.0",
        "odata-version": "4.0",
        "user-agent": "hlf-dynamics-sync",
        "x-ms-correlation-id": str(EVENT),
        "authorization": "Bearer a-token",
        **{
            "direct": {"content-length": "27"},
            # Every fetch says so; and a stream, which cannot be sent twice, has no length.
            "edge": {"accept-language": "*", "transfer-encoding": "chunked"},
        }[road.name],
    }


async def test_an_alternate_key_is_sent_percent_encoded(road: Road) -> None:
    """
    Nothing on the way decodes it or encodes it twice.
    """
    async with serving(says(NO_CONTENT)) as server, travelling(road, server.url, KEY) as client:
        await client.set_visibility(
            "O'Neil /%2F", visible=True, seconds=GENEROUS_SECONDS, correlation_id=EVENT
        )
    first, _ = server.heads[0]
    assert first == "PATCH /api/data/v9.2/contacts(hlf_no='O%27%27Neil%20%2F%252F') HTTP/1.1"


@pytest.mark.parametrize(
    "answer", [NO_CONTENT, json_answer("200 OK", {"@odata.context": "x"})], ids=["204", "200"]
)
async def test_a_custom_api_is_called_with_its_arguments(road: Road, answer: bytes) -> None:
    """
    By POST, without If-Match; it may answer 204, or 200 with its results.
    """
    async with serving(says(answer)) as server, travelling(road, server.url, ACTION) as client:
        await hide(client)
    (request,) = server.requests
    first, headers = _head(request)
    assert first == "POST /api/data/v9.2/hlf_SetVisibility HTTP/1.1"
    assert "if-match" not in headers
    assert json.loads(request.partition(b"\r\n\r\n")[2]) == {"MentorId": str(ROW), "Visible": False}


async def test_each_attempt_has_an_id_of_its_own_and_each_event_keeps_its_own(road: Road) -> None:
    """
    Both are in Microsoft's log, and ours.
    """
    async with serving(says(NO_CONTENT)) as server, travelling(road, server.url) as client:
        await hide(client)
        await hide(client)
    first, second = (headers for _, headers in server.heads)
    assert first["x-ms-correlation-id"] == second["x-ms-correlation-id"] == str(EVENT)
    assert first["x-ms-client-request-id"] != second["x-ms-client-request-id"]


async def test_connections_are_used_again(road: Road) -> None:
    """
    Also after a refusal, whose body was read.
    """
    refusal = json_answer("404 Not Found", {"error": {"code": "0x80040217", "message": ""}})
    async with (
        serving(says(NO_CONTENT), says(refusal), says(NO_CONTENT)) as server,
        travelling(road, server.url) as client,
    ):
        await hide(client)
        with pytest.raises(PermanentError):
            await hide(client)
        await hide(client)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        (PATCH, json_answer("200 OK", {"hlf_portalvisible": False})),
        (PATCH, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (PATCH, b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"),
        (ACTION, b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<html>Sign in "),
        (ACTION, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (ACTION, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"),
        (ACTION, b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"),
    ],
)
async def test_a_success_that_dynamics_would_not_give_is_no_success(
    road: Road, fields: Fields, answer: bytes
) -> None:
    """
    A login page says 200, too.
    """
    error, _ = await failure_of(road, says(answer), fields=fields)
    assert isinstance(error, TransientError)
    assert error.code == "unexpected_answer"
    assert error.doubtful


@pytest.mark.parametrize(
    "script",
    [
        drips(b"HTTP/1.1 204 No Content\r\n", for_ever=b"X"),
        drips(b"HTTP/1.1 404 Not Found\r\nContent-Length: 60000\r\n\r\n", for_ever=b" "),
        drips(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n", for_ever=b"1\r\n \r\n"),
        hangs,
    ],
    ids=["in the head", "in the body", "in chunks", "silent"],
)
async def test_a_slow_answer_meets_the_deadline(road: Road, script: Script) -> None:
    """
    However steadily its bytes come; it may have taken effect.
    """
    started = time.monotonic()
    error, server = await failure_of(road, script, seconds=road.deadline(0.3))
    assert time.monotonic() - started < 10
    assert isinstance(error, TransientError)
    assert error.code == "timeout"
    assert error.doubtful
    assert len(server.requests) == 1


async def test_deadlines_do_not_use_up_the_places() -> None:
    """
    However many requests meet it while others wait for a place, the next one goes through.
    """
    async with serving(hangs) as server, client_of(server.url) as client:
        for _ in range(5):
            late = await asyncio.gather(
                *(hide(client, seconds=0.05 + 0.001 * (i % 7)) for i in range(40)),
                return_exceptions=True,
            )
            assert {type(error) for error in late} == {TransientError}
        server.scripts = [says(NO_CONTENT)]
        await hide(client)


async def test_waiting_for_a_place_is_not_doubtful() -> None:
    """
    Nothing was sent for it, though the connections of others were busy.
    """
    busy = asyncio.Semaphore(0)

    async def hang(writer: asyncio.StreamWriter) -> None:
        busy.release()
        await hangs(writer)

    async with serving(hang) as server, client_of(server.url) as client:
        others = [asyncio.create_task(hide(client)) for _ in range(CONNECTIONS)]
        for _ in others:
            await busy.acquire()
        with pytest.raises(TransientError) as raised:
            await hide(client, seconds=0.2)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
    assert raised.value.code == "timeout"
    assert not raised.value.doubtful
    assert len(server.requests) == server.connections == CONNECTIONS


async def test_an_oversized_answer_is_cut(road: Road) -> None:
    """
    The server can send no more than what fits in the buffers on the way.
    """
    sent = 0

    async def without_end(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()

    error, _ = await failure_of(road, without_end)
    assert error.code == "server_error"
    assert not error.doubtful
    assert sent < 300 * MAX_ANSWER_BYTES


async def test_a_compressed_answer_is_not_unpacked(road: Road) -> None:
    """
    A megabyte of zeros fits in a kilobyte; and this error code would be believed otherwise.
    """
    text = b'{"error":{"code":"0x80040217","message":"' + b"0" * 1_000_000 + b'"}}'
    bomb = gzip.compress(text)
    head = f"HTTP/1.1 500 Oops\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    small = gzip.compress(b'{"error":{"code":"0x80040217","message":""}}')
    tail = f"HTTP/1.1 500 Oops\r\nContent-Encoding: gzip\r\nContent-Length: {len(small)}\r\n\r\n"
    for answer in (head.encode() + bomb, tail.encode() + small):
        error, _ = await failure_of(road, says(answer))
        assert error.code == "server_error"


@pytest.mark.parametrize(
    "location", ["{url}/api", "https://a:port/", "", "ftp://x", "//evil.example"]
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_refused_and_nobody_else_is_asked(
    road: Road, status: int, location: str
) -> None:
    """
    Wherever it points, and however badly.
    """
    async with serving(says(NO_CONTENT)) as other:
        where = location.format(url=other.url)
        answer = f"HTTP/1.1 {status} X\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n"
        error, server = await failure_of(road, says(answer.encode()))
        assert isinstance(error, ConfigurationError)
        assert error.code == "redirect_refused"
        assert len(server.requests) == 1
        assert other.connections == 0


async def test_an_answer_that_is_lost_on_a_used_connection_is_doubtful(road: Road) -> None:
    """
    Nobody on the way may send the request again: the answer to the second would hide the first.
    """
    for script in (resets, hangs_up, says(b"HTTP/1.1 204 No Con", then_close=True)):
        async with (
            serving(says(NO_CONTENT), script, says(NO_CONTENT)) as server,
            travelling(road, server.url) as client,
        ):
            await hide(client)
            with pytest.raises(TransientError) as raised:
                await hide(client)
        assert raised.value.doubtful
        assert (server.connections, len(server.requests)) == (1, 2)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (resets, "connection_lost"),
        (hangs_up, "incomplete_answer"),
        (says(b"SSH-2.0-OpenSSH_9.9\r\n", then_close=True), "incomplete_answer"),
        (says(b"\x00\xff" * 40, then_close=True), "incomplete_answer"),
        (says(b"HTTP/1.1 204 No Con", then_close=True), "incomplete_answer"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", then_close=True), "incomplete"),
    ],
    ids=["reset", "closed", "other protocol", "bytes", "half a head", "half a body"],
)
@pytest.mark.parametrize("fields", [PATCH, ACTION], ids=["patch", "action"])
async def test_a_lost_answer_is_doubtful(
    road: Road, script: Script, code: str, fields: Fields
) -> None:
    """
    The request was sent, once; what became of it nobody knows.
    """
    error, server = await failure_of(road, script, fields=fields)
    assert isinstance(error, TransientError)
    assert error.code.startswith(code)
    assert error.doubtful
    assert len(server.requests) == 1


async def test_an_answer_without_a_length_ends_with_the_connection(road: Road) -> None:
    """
    As HTTP/1.0 does it.
    """
    body = b'{"error":{"code":"0x80040217","message":"x"}}'
    error, _ = await failure_of(
        road, says(b"HTTP/1.1 404 Not Found\r\n\r\n" + body, then_close=True)
    )
    assert isinstance(error, PermanentError)
    assert error.code == "record_not_found"


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        ("37", 37),
        ("Tue, 01 Jan 2099 00:00:00 GMT", MAX_RETRY_AFTER_SECONDS),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("soon", None),
    ],
)
async def test_retry_after_of_an_answer_is_obeyed(
    road: Road, wait: str, seconds: float | None
) -> None:
    """
    In the error, whether it says for how long or until when; the gate does the waiting.
    """
    refusal = {"error": {"code": "0x80072322", "message": "Number of requests exceeded"}}
    answer = json_answer("429 Too Many Requests", refusal, f"Retry-After: {wait}")
    error, server = await failure_of(road, says(answer))
    assert isinstance(error, ThrottledError)
    assert error.retry_after == seconds
    assert not error.doubtful
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "doubtful"),
    [
        ("500 Internal Server Error", "server_error", False),
        ("502 Bad Gateway", "bad_gateway", True),
        ("503 Service Unavailable", "unavailable", False),
        ("504 Gateway Timeout", "server_timeout", True),
        ("507 Insufficient Storage", "http_507", False),
    ],
)
async def test_a_failing_server_is_asked_once_only(
    road: Road, status: str, code: str, *, doubtful: bool
) -> None:
    """
    The policy does the retrying, nobody on the way.
    """
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 6\r\n\r\n<html>".encode()
    error, server = await failure_of(road, says(answer))
    assert isinstance(error, TransientError)
    assert (error.code, error.doubtful) == (code, doubtful)
    assert len(server.requests) == 1


class Overheard(HttpClient):
    """
    Counts its tries, and tells a listener of those that failed.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, failed: Listener | None = None
    ) -> None:
        super().__init__(tls=tls)
        self.tries = 0
        self._failed = failed

    @override
    async def send(self, outgoing: Outgoing, trail: Trail | None = None) -> Answer:
        """
        As everybody's.
        """
        self.tries += 1
        try:
            return await super().send(outgoing, trail)
        except NoAnswerError:
            if self._failed is not None:
                await self._failed()
            raise


def overheard_client(url: str, http: HttpClient) -> DynamicsClient:
    """
    A client for a server without tokens, that sends by this one.
    """
    return DynamicsClient(DynamicsTarget(url=url), Exchange(http, Nobody()))


async def test_where_nobody_listens_nothing_is_doubtful(road: Road) -> None:
    """
    Nothing can have reached Dynamics.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with travelling(road, url) as client:
            with pytest.raises(TransientError) as raised:
                await hide(client)
    assert raised.value.code == "unreachable"
    assert not raised.value.doubtful


async def test_a_refused_connection_is_tried_three_times_and_is_not_doubtful() -> None:
    """
    Nothing can have reached Dynamics.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        http = Overheard()
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with overheard_client(url, http) as client:
            with pytest.raises(TransientError) as raised:
                await hide(client)
    assert raised.value.code == "unreachable"
    assert not raised.value.doubtful
    assert http.tries == 3


class Torn(Nobody):
    """
    Proves it by a value that no header can hold.
    """

    @override
    async def authorization(self, _url: URL) -> str:
        """
        Of any address.
        """
        return "Bearer torn\napart"


async def test_a_request_that_cannot_be_written_is_not_doubtful() -> None:
    """
    There is a connection, and nothing goes over it: no state has to be said once more for it.
    """
    async with serving(says(NO_CONTENT)) as server:
        exchange = Exchange(HttpClient(), Torn())
        async with DynamicsClient(DynamicsTarget(url=server.url), exchange) as client:
            with pytest.raises(ConfigurationError) as raised:
                await hide(client)
    assert raised.value.code == "invalid_address"
    assert not raised.value.doubtful
    assert server.requests == []


async def test_a_server_that_comes_up_meanwhile_is_reached_by_the_next_try() -> None:
    """
    A restart of a gateway costs no attempt.
    """
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        server = Server(says(NO_CONTENT))
        listeners: list[asyncio.Server] = []

        async def listen_after_a_failure() -> None:
            if not listeners:
                listeners.append(await asyncio.start_server(server.meet, sock=plug))

        url = f"http://127.0.0.1:{plug.getsockname()[1]}"
        async with overheard_client(url, Overheard(failed=listen_after_a_failure)) as client:
            await hide(client)
        listeners[0].close()
        await server.stop()
    assert len(server.requests) == 1


async def test_the_deadline_holds_over_all_tries() -> None:
    """
    It is not doubtful: no connection was ever made.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with client_of(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(TransientError) as raised:
                await hide(client, seconds=0.05)
    assert raised.value.code == "timeout"
    assert not raised.value.doubtful


async def test_cookies_are_not_kept(road: Road) -> None:
    """
    They would bind every request to one web server of Dataverse.
    """
    answer = b"HTTP/1.1 204 No Content\r\nSet-Cookie: ARRAffinity=abc; Path=/\r\n\r\n"
    async with serving(says(answer)) as server, travelling(road, server.url) as client:
        await hide(client)
        await hide(client)
    assert all("cookie" not in headers for _, headers in server.heads)


def tls_contexts(
    *, trusted: bool, name: str = "localhost"
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """
    For a server with a certificate for `name`, and for a client that trusts it or does not.
    """
    authority = trustme.CA()
    for_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(for_server)
    for_client = ssl.create_default_context()
    if trusted:
        authority.configure_trust(for_client)
    return for_server, for_client


async def test_tls_with_a_trusted_certificate_works() -> None:
    """
    Otherwise the refusals below would prove nothing.
    """
    for_server, for_client = tls_contexts(trusted=True)
    async with (
        serving(says(NO_CONTENT), tls=for_server) as server,
        client_of(server.url, tls=for_client) as client,
    ):
        await hide(client)


@pytest.mark.parametrize(
    ("trusted", "name"), [(False, "localhost"), (True, "other.example")], ids=["issuer", "name"]
)
async def test_a_wrong_certificate_is_a_matter_of_configuration(
    *, trusted: bool, name: str
) -> None:
    """
    It is not tried again, and nothing is sent.
    """
    for_server, for_client = tls_contexts(trusted=trusted, name=name)
    http = Overheard(tls=for_client)
    async with (
        serving(says(NO_CONTENT), tls=for_server) as server,
        overheard_client(server.url, http) as client,
    ):
        with pytest.raises(ConfigurationError) as raised:
            await hide(client)
    assert raised.value.code == "certificate"
    assert http.tries == 1
    assert not raised.value.doubtful
    assert server.requests == []


async def test_a_cancelled_call_is_cancelled_and_leaves_the_client_usable() -> None:
    """
    A worker that stops does not get an error of Dynamics.
    """
    arrived = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await hangs(writer)

    async with serving(hang, says(NO_CONTENT)) as server, client_of(server.url) as client:
        call = asyncio.create_task(hide(client))
        await arrived.wait()
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        await hide(client)


async def test_a_refusal_is_logged_with_microsofts_request_id_and_nothing_else(road: Road) -> None:
    """
    It is what their support asks for; it counts only if it is a GUID.
    """
    refusal = {"error": {"code": "0x80040220", "message": "Full Name lacks prvWriteContact"}}
    request_id = uuid4()
    good = json_answer("403 Forbidden", refusal, f"x-ms-service-request-id: {request_id}")
    odd = json_answer("403 Forbidden", refusal, "x-ms-service-request-id: Full Name")
    with capture_logs() as logs:
        await failure_of(road, says(good))
        await failure_of(road, says(odd))
    assert [log["service_request_id"] for log in logs] == [str(request_id), None]
    assert [log["event"] for log in logs] == ["request.refused"] * 2
    assert "Full Name" not in str(logs)

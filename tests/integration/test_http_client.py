"""
The HTTP client over real sockets: what it sends, what it does not do, and what no answer is called.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from yarl import URL

from tests.integration.test_dynamics_client import NO_CONTENT, hangs, says, serving
from worker.http_client import (
    HttpClient,
    NoAnswerError,
    Outgoing,
    Trail,
    checked_address,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

CANARY = "canary-secret-Zm9v"


def get(
    url: str, headers: Mapping[str, str] | None = None, *, answer_bytes: int = 1000
) -> Outgoing:
    """
    A request without a body.
    """
    return Outgoing(method="GET", url=URL(url), headers=headers or {}, answer_bytes=answer_bytes)


async def test_a_request_says_no_more_than_it_has_to() -> None:
    """
    Two headers of the client's own, one of HTTP's, and one of the library's.
    """
    async with serving(says(NO_CONTENT)) as server, HttpClient() as http:
        answer = await http.send(get(f"{server.url}/a?b=c", {"Here": "there"}))

    assert (answer.status, answer.body, answer.is_success) == (204, b"", True)
    first, *headers = server.requests[0].decode().strip().split("\r\n")
    assert first == "GET /a?b=c HTTP/1.1"
    assert dict(line.split(": ") for line in headers) == {
        "Host": server.url.removeprefix("http://"),
        "Accept-Encoding": "identity",
        "User-Agent": "hlf-dynamics-sync",
        "Here": "there",
        "Accept": "*/*",
    }


async def test_the_environment_does_not_change_where_requests_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Whoever can set a variable of a process gets no tokens by it.
    """
    async with serving(says(NO_CONTENT)) as proxy, serving(says(NO_CONTENT)) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with HttpClient() as http:
            await http.send(get(server.url))
    assert len(server.requests) == 1
    assert proxy.connections == 0


async def test_a_long_answer_is_cut_and_its_connection_not_used_again() -> None:
    """
    What is left of it would be taken for the next answer.
    """
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000
    short = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with serving(says(long), says(short)) as server, HttpClient() as http:
        assert (await http.send(get(server.url, answer_bytes=7))).body == b"x" * 7
        assert (await http.send(get(server.url, answer_bytes=2))).body == b"ok"
        assert server.connections == 2


async def test_connections_are_kept_only_by_whoever_wants_it() -> None:
    """
    And the server is told.
    """
    for keep_alive, connections in ((True, 1), (False, 2)):
        async with serving(says(NO_CONTENT)) as server, HttpClient(keep_alive=keep_alive) as http:
            await http.send(get(server.url))
            await http.send(get(server.url))
        assert server.connections == connections
        assert all((b"close" in request) is not keep_alive for request in server.requests)


async def test_a_trail_says_that_something_was_sent_even_if_the_request_is_given_up() -> None:
    """
    That is what a doubt depends on.
    """
    trail = Trail()
    arrived = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await hangs(writer)

    async with serving(hang) as server, HttpClient() as http:
        request = asyncio.create_task(http.send(get(server.url), trail))
        await arrived.wait()
        request.cancel()
        await asyncio.wait({request})
    assert trail.sent


async def test_a_trail_says_that_nothing_was_sent_where_there_was_no_connection() -> None:
    """
    The port is one that nobody may have.
    """
    trail = Trail()
    async with HttpClient() as http:
        with pytest.raises(NoAnswerError) as raised:
            await http.send(get("http://127.0.0.1:1"), trail)
    assert raised.value.reason == "unreachable"
    assert not trail.sent


@pytest.mark.parametrize(
    ("url", "headers", "reason"),
    [
        ("http://name.invalid/", {}, "unreachable"),
        ("ftp://127.0.0.1/", {}, "address"),
        ("/nowhere", {}, "address"),
        ("http://127.0.0.1:1/", {"Evil": f"{CANARY}\r\nX: 1"}, "unreachable"),
    ],
)
async def test_what_cannot_be_asked_has_a_reason_and_repeats_nothing(
    url: str, headers: dict[str, str], reason: str
) -> None:
    """
    No exception of the library hangs on ours: its text may hold what was sent.
    """
    async with HttpClient() as http:
        with pytest.raises(NoAnswerError) as raised:
            await http.send(get(url, headers))
    assert raised.value.reason == reason
    assert raised.value.__cause__ is raised.value.__context__ is None
    assert CANARY not in f"{raised.value!r}"


async def test_a_header_cannot_smuggle_in_another() -> None:
    """
    It is refused before anything is sent, and the trail says so: nothing can come of it later.
    """
    trail = Trail()
    async with serving(says(NO_CONTENT)) as server, HttpClient() as http:
        with pytest.raises(NoAnswerError) as raised:
            await http.send(get(server.url, {"Evil": f"{CANARY}\r\nX: 1"}), trail)
    assert raised.value.reason == "address"
    assert server.requests == []
    assert not trail.sent


@pytest.mark.parametrize(
    "url",
    [
        "https://hlf.crm4.dynamics.com",
        "https://hlf.crm4.dynamics.com/",
        "https://hlf.crm4.dynamics.com:8443",
        "http://localhost:8080",
        "http://127.0.0.1:8080",
        "http://127.8.8.8",
        "http://[::1]:8080",
    ],
)
def test_https_anywhere_and_plain_http_on_this_machine_are_accepted(url: str) -> None:
    """
    As the settings promise.
    """
    assert str(checked_address("The URL", url)).rstrip("/") == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hlf.crm4.dynamics.com",
        "ftp://hlf.crm4.dynamics.com",
        "http://hlf.crm4.dynamics.com",
        "http://localhost.example",
        "http://127.0.0.1.example",
        "http://10.0.0.1",
        "https://",
        "https://user:canary-secret-Zm9v@hlf.crm4.dynamics.com",
        "https://hlf.crm4.dynamics.com/api/data",
        "https://hlf.crm4.dynamics.com?a=canary-secret-Zm9v",
        "https://hlf.crm4.dynamics.com#a",
        "https://hlf.crm4.dynamics.com:notaport",
        "https://hlf\n.crm4.dynamics.com",
    ],
)
def test_an_address_that_a_secret_must_not_go_to_is_refused(url: str) -> None:
    """
    In one sentence, which does not repeat it.
    """
    with pytest.raises(ValueError, match=r"^The URL must [^.]*(\.example)?[^.]*\.$") as raised:
        checked_address("The URL", url)
    assert CANARY not in str(raised.value)

"""
What no page has to think of: hosts, other sites' forms, sizes, headers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.datastructures import Headers

from tests.integration.test_callers import coordinator
from tests.served import served
from worker.coordinator import guard
from worker.coordinator.access import Local
from worker.coordinator.app import create_app
from worker.coordinator.guard import hostname, is_our_own

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World

RETRY = "/api/v1/failures/retry"


@pytest.fixture
async def browser(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """
    A client of a dashboard without a login.
    """
    app = create_app(world.engine, access=Local(coordinator(world.hlf)), timezone="Europe/Oslo")
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "10.0.0.1",
        "",
        "[::2]",
    ],
)
async def test_a_name_that_points_here_is_not_answered(
    browser: httpx.AsyncClient, host: str
) -> None:
    """
    Somebody else's page could read what it was answered, as its own.
    """
    answer = await browser.get("/api/v1/status", headers={"Host": host})
    assert answer.status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"])
async def test_this_machines_names_are_answered(browser: httpx.AsyncClient, host: str) -> None:
    """
    With any port.
    """
    assert (await browser.get("/api/v1/status", headers={"Host": host})).status_code == 200


CROSS = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"},
    {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer x"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "text/plain; application/json"},
]


@pytest.mark.parametrize("headers", CROSS)
async def test_another_sites_form_changes_nothing(
    browser: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    """
    Whoever is logged in did not send it.
    """
    answer = await browser.post(RETRY, headers=headers)
    assert answer.status_code == 403


async def test_our_own_form_and_an_app_are_let_through(browser: httpx.AsyncClient) -> None:
    """
    A browser says where it comes from; an app sends a token or JSON.
    """
    own = str(browser.base_url).rstrip("/")
    for headers in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": own},
        {"Authorization": "Bearer x"},
        {"Content-Type": "application/json; charset=utf-8"},
    ):
        assert (await browser.post(RETRY, headers=headers)).status_code == 200


async def test_looking_is_harmless(browser: httpx.AsyncClient) -> None:
    """
    A link from elsewhere works.
    """
    for method in ("GET", "HEAD"):
        answer = await browser.request(
            method, "/robots.txt", headers={"Sec-Fetch-Site": "cross-site"}
        )
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("/robots.txt", 200), ("/api/v1/status", 200), ("/nothing", 404), ("/api/v1/x", 404)],
)
async def test_every_answer_has_the_headers(
    browser: httpx.AsyncClient, path: str, status: int
) -> None:
    """
    Nothing inline, nothing framed, nothing kept.
    """
    answer = await browser.get(path)
    assert answer.status_code == status
    for name, value in guard.HEADERS.items():
        assert answer.headers[name] == value
    assert "server" not in answer.headers
    assert "strict-transport-security" not in answer.headers


async def test_an_answer_that_nobody_expected_has_the_headers_too(world: World) -> None:
    """
    It says nothing about what happened; behind https it says so.
    """
    app = create_app(
        world.engine,
        access=Local(coordinator(world.hlf)),
        timezone="Europe/Oslo",
        https=True,
    )
    app.state.actions = None
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(RETRY, headers={"Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:hlf-sync:problem:unexpected"
    assert "NoneType" not in answer.text
    assert answer.headers["content-security-policy"] == guard.CONTENT_SECURITY
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


async def test_a_large_request_is_refused(browser: httpx.AsyncClient) -> None:
    """
    With its length said or not.
    """
    path = "/api/v1/failures/00000000-0000-4000-8000-000000000001/handled"
    headers = {"Content-Type": "application/json"}
    large = b'{"note": "' + b"x" * guard.MOST_BYTES + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        yield large

    for content in (large, pieces()):
        answer = await browser.post(path, content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.headers["content-security-policy"]


def test_a_host_is_read_without_its_port() -> None:
    """
    Also where it is an address with colons.
    """
    assert [hostname(one) for one in ("A:1", "a", "[::1]:8080", "[::1]", "a:b")] == [
        *("a", "a", "[::1]", "[::1]", "a:b")
    ]


def test_what_a_browser_says_counts_more_than_what_it_sends() -> None:
    """
    A site that is said to be another's is not made ours by a header that scripts can set.
    """
    assert not is_our_own(
        Headers({"sec-fetch-site": "cross-site", "origin": "http://a", "host": "a"})
    )

"""
One token for everybody, renewed in time, and sent to one host only.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import pytest
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.testing import capture_logs
from typing_extensions import override
from yarl import URL

from outbox.errors import ConfigurationError, DeliveryError, ThrottledError, TransientError
from worker.dynamics import token
from worker.dynamics.exchange import Exchange
from worker.dynamics.token import AccessToken, EntraAuth, token_from_answer
from worker.http_client import Answer, HttpClient, NoAnswerError, Outgoing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from worker.http_client import Trail

AUTHORITY = "https://login.example"
RESOURCE = "https://hlf.crm4.dynamics.example"
TENANT = "8a4c1c0e-0000-4000-8000-000000000001"
SECRET = "canary-secret-Zm9v"  # noqa: S105 - it is to be looked for, not to be used


def answer(status: int, body: object = b"", **headers: str) -> Answer:
    """
    An answer; a body that is no bytes becomes JSON.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, headers=named, body=content)


class Clock:
    """
    Monotonic seconds that pass when told to.
    """

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """
        The time.
        """
        return self.now


class Authority(HttpClient):
    """
    A token endpoint in memory: "token-1", "token-2", …, unless told otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[dict[str, str]] = []
        self.urls: list[str] = []
        self.answers: deque[Answer | Exception] = deque()
        self.life_seconds: object = 3_600
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    @override
    async def send(self, outgoing: Outgoing, trail: Trail | None = None) -> Answer:
        """
        Answer a token request, when `open`.
        """
        form = parse_qs(outgoing.body.decode())
        self.forms.append({name: values[0] for name, values in form.items()})
        self.urls.append(str(outgoing.url))
        self.asked.set()
        await self.open.wait()
        if self.answers:
            prepared = self.answers.popleft()
            if isinstance(prepared, Exception):
                raise prepared
            return prepared
        value = f"token-{len(self.forms)}"
        return answer(
            200,
            {"token_type": "Bearer", "expires_in": self.life_seconds, "access_token": value},
        )


class Resource(HttpClient):
    """
    Dynamics in memory: notes the tokens it is shown, refuses those it is told to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.refused: set[str] = set()
        self.seen = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    @override
    async def send(self, outgoing: Outgoing, trail: Trail | None = None) -> Answer:
        """
        Answer 204 or 401, when `open`.
        """
        shown = outgoing.headers["Authorization"].removeprefix("Bearer ")
        self.tokens.append(shown)
        self.seen.set()
        await self.open.wait()
        return answer(401 if shown in self.refused else 204)


class Setup:
    """
    A client of `resource` with a token of `authority`.
    """

    def __init__(self, *, secret: Callable[[], str] = lambda: SECRET, seconds: float = 60) -> None:
        self.authority = Authority()
        self.resource = Resource()
        self.clock = Clock()
        self.auth = EntraAuth(
            authority=AUTHORITY,
            tenant_id=TENANT,
            client_id="client-1",
            secret=secret,
            resource=RESOURCE,
            http=self.authority,
            clock=self.clock,
            seconds=seconds,
        )
        self.exchange = Exchange(self.resource, self.auth, places=1_000)

    async def call(self, url: str = f"{RESOURCE}/api") -> int:
        """
        One request; its status.
        """
        outgoing = Outgoing(method="PATCH", url=URL(url), body=b"{}")
        answered = await self.exchange.answer(outgoing, 60)
        assert isinstance(answered, Answer)
        return answered.status


@asynccontextmanager
async def prepared(
    *, secret: Callable[[], str] = lambda: SECRET, seconds: float = 60
) -> AsyncIterator[Setup]:
    """
    A `Setup` that is closed at the end.
    """
    setup = Setup(secret=secret, seconds=seconds)
    try:
        yield setup
    finally:
        await setup.exchange.aclose()
        await setup.auth.aclose()


async def test_a_token_that_is_refused_is_logged_as_nobodys() -> None:
    """
    Many may wait for it; that one of them asked first does not make it about that one.
    """
    async with prepared() as setup:
        setup.authority.answers.append(answer(401, {"error": "invalid_client"}))
        with (
            capture_logs(processors=[merge_contextvars]) as logs,
            bound_contextvars(event_id=7),
            pytest.raises(ConfigurationError),
        ):
            await setup.call()

    [line] = [line for line in logs if line["event"] == "token.refused"]
    assert "event_id" not in line


async def test_the_token_request_is_the_client_credentials_grant() -> None:
    """
    Four fields to the tenant's endpoint, the scope being the resource's default.
    """
    async with prepared() as setup:
        await setup.call()
        assert setup.authority.urls == [f"{AUTHORITY}/{TENANT}/oauth2/v2.0/token"]
        assert setup.authority.forms == [
            {
                "grant_type": "client_credentials",
                "client_id": "client-1",
                "client_secret": SECRET,
                "scope": f"{RESOURCE}/.default",
            }
        ]


async def test_200_calls_at_once_make_one_token_request() -> None:
    """
    All of them wait for the same one.
    """
    async with prepared() as setup:
        setup.authority.open.clear()
        calls = [asyncio.create_task(setup.call()) for _ in range(200)]
        await setup.authority.asked.wait()
        setup.authority.open.set()
        assert await asyncio.gather(*calls) == [204] * 200
        assert len(setup.authority.forms) == 1
        assert setup.resource.tokens == ["token-1"] * 200


async def test_a_token_is_kept_until_shortly_before_its_end() -> None:
    """
    Five minutes before, of an hour.
    """
    async with prepared() as setup:
        await setup.call()
        setup.clock.now += 3_299
        await setup.call()
        setup.clock.now += 1
        await setup.call()
        assert setup.resource.tokens == ["token-1", "token-1", "token-2"]


async def test_a_short_lived_token_is_renewed_in_its_last_tenth() -> None:
    """
    Five minutes early would be at once.
    """
    async with prepared() as setup:
        setup.authority.life_seconds = 60
        for passed in (0, 53, 1):
            setup.clock.now += passed
            await setup.call()
        assert setup.resource.tokens == ["token-1", "token-1", "token-2"]


async def test_a_token_without_life_is_used_once() -> None:
    """
    It is no reason to fail, nor to loop.
    """
    async with prepared() as setup:
        setup.authority.life_seconds = 0
        assert [await setup.call(), await setup.call()] == [204, 204]
        assert setup.resource.tokens == ["token-1", "token-2"]


async def test_a_failed_early_renewal_leaves_the_old_token_in_use() -> None:
    """
    And the authority alone for a while; when the token has ended, the failure counts.
    """
    async with prepared() as setup:
        await setup.call()
        setup.clock.now += 3_301
        setup.authority.answers += [answer(503), answer(503), answer(503)]
        assert [await setup.call(), await setup.call()] == [204, 204]
        assert len(setup.authority.forms) == 2
        setup.clock.now += 30
        assert await setup.call() == 204
        assert len(setup.authority.forms) == 3
        setup.clock.now += 300
        with pytest.raises(TransientError) as raised:
            await setup.call()
        assert raised.value.code == "token_unavailable"
        assert await setup.call() == 204
        assert setup.resource.tokens == ["token-1"] * 4 + ["token-5"]


async def test_a_slow_early_renewal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The old token goes meanwhile; the renewal goes on and is used when it is there.
    """
    monkeypatch.setattr(token, "PATIENCE_SECONDS", 0.01)
    async with prepared() as setup:
        await setup.call()
        setup.clock.now += 3_301
        setup.authority.open.clear()
        assert await setup.call() == 204
        setup.authority.open.set()
        renewal = setup.auth._renewal
        assert renewal is not None
        await renewal
        await setup.call()
        assert setup.resource.tokens == ["token-1", "token-1", "token-2"]
        assert len(setup.authority.forms) == 2


async def test_a_401_renews_the_token_once_and_repeats_the_request_once() -> None:
    """
    A second 401 is the answer.
    """
    async with prepared() as setup:
        setup.resource.refused = {"token-1"}
        assert await setup.call() == 204
        assert setup.resource.tokens == ["token-1", "token-2"]
        setup.resource.refused = {"token-2", "token-3", "token-4"}
        assert await setup.call() == 401
        assert setup.resource.tokens[2:] == ["token-2", "token-3"]


async def test_many_401s_for_the_same_token_make_one_renewal() -> None:
    """
    Whoever comes later uses what another call has renewed.
    """
    async with prepared() as setup:
        await setup.call()
        setup.resource.refused = {"token-1"}
        calls = [asyncio.create_task(setup.call()) for _ in range(50)]
        assert await asyncio.gather(*calls) == [204] * 50
        assert len(setup.authority.forms) == 2


async def test_a_late_401_for_an_old_token_takes_the_new_one_without_asking() -> None:
    """
    The refusal is about a token that nobody uses any more.
    """
    async with prepared() as setup:
        await setup.call()
        setup.resource.seen.clear()
        setup.resource.open.clear()
        late = asyncio.create_task(setup.call())
        await setup.resource.seen.wait()
        setup.clock.now += 3_301
        setup.resource.seen.clear()
        renewed = asyncio.create_task(setup.call())
        await setup.resource.seen.wait()
        setup.resource.refused = {"token-1"}
        setup.resource.open.set()
        assert [await late, await renewed] == [204, 204]
        assert len(setup.authority.forms) == 2


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/api",
        "https://hlf.crm4.dynamics.example.evil.example/api",
        "https://crm4.dynamics.example/api",
        "https://hlf.crm4.dynamics.example:8443/api",
        "http://hlf.crm4.dynamics.example/api",
        "https://hlf.crm4.dynamics.example./api",
        "https://hlf.crm4.dynamics.example@other.example/api",
    ],
)
async def test_a_request_to_another_host_is_refused_before_anything_is_sent(url: str) -> None:
    """
    Not even a token is fetched for it.
    """
    async with prepared() as setup:
        with pytest.raises(ConfigurationError) as raised:
            await setup.call(url)
        assert raised.value.code == "other_host"
        assert setup.resource.tokens == []
        assert setup.authority.forms == []


async def test_the_same_host_in_another_spelling_is_the_same_host() -> None:
    """
    Capitals and the default port make no difference.
    """
    async with prepared() as setup:
        assert await setup.call("https://HLF.crm4.dynamics.example:443/api") == 204


async def test_a_failed_token_request_is_shared_and_does_not_poison_the_next() -> None:
    """
    All who waited fail with it; whoever comes later asks again.
    """
    async with prepared() as setup:
        setup.authority.answers.append(answer(503))
        calls = [asyncio.create_task(setup.call()) for _ in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TransientError}
        assert len(setup.authority.forms) == 1
        assert setup.resource.tokens == []
        assert await setup.call() == 204


async def test_one_who_stops_waiting_does_not_stop_the_others() -> None:
    """
    Even if it was the one who began the request.
    """
    async with prepared() as setup:
        setup.authority.open.clear()
        first = asyncio.create_task(setup.call())
        await setup.authority.asked.wait()
        second = asyncio.create_task(setup.call())
        first.cancel()
        await asyncio.wait({first})
        assert first.cancelled()
        setup.authority.open.set()
        assert await second == 204
        assert len(setup.authority.forms) == 1


async def test_a_token_request_has_a_deadline_of_its_own() -> None:
    """
    And is not doubtful: Dynamics got nothing.
    """
    async with prepared(seconds=0.01) as setup:
        setup.authority.open.clear()
        with pytest.raises(TransientError) as raised:
            await setup.call()
        assert raised.value.code == "token_unavailable"
        assert not raised.value.doubtful


async def test_a_rotated_secret_is_picked_up() -> None:
    """
    It is read for each token request.
    """
    secrets = iter(["old", "new"])
    async with prepared(secret=lambda: next(secrets)) as setup:
        setup.resource.refused = {"token-1"}
        await setup.call()
        assert [form["client_secret"] for form in setup.authority.forms] == ["old", "new"]


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (answer(401, {"error": "invalid_client"}), ConfigurationError, "refused"),
        (answer(429, Retry_After="7"), ThrottledError, "throttled"),
        (answer(302, Location="https://a.example"), ConfigurationError, ""),
        (answer(200, b"<html>"), TransientError, "unusable"),
        (NoAnswerError("unreachable", "ConnectorError"), TransientError, "unavailable"),
        (NoAnswerError("lost", "ConnectorError"), TransientError, "unavailable"),
    ],
)
async def test_a_failed_token_request_says_why(
    answer: Answer | Exception, kind: type[DeliveryError], code: str
) -> None:
    """
    By the class of the error, so by what becomes of the events.
    """
    async with prepared() as setup:
        setup.authority.answers.append(answer)
        with pytest.raises(DeliveryError) as raised:
            await setup.call()
        assert type(raised.value) is kind
        assert raised.value.code == (f"token_{code}" if code else "redirect_refused")
        assert raised.value.__cause__ is None
        assert raised.value.__context__ is None
        assert SECRET not in raised.value.message


async def test_a_secret_that_cannot_be_read_is_a_matter_of_configuration() -> None:
    """
    What its reader said is kept out: it may hold the secret itself.
    """

    def unreadable() -> str:
        raise UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET)

    async with prepared(secret=unreadable) as setup:
        with pytest.raises(ConfigurationError) as raised:
            await setup.call()
        assert raised.value.code == "secret_unreadable"
        assert SECRET not in f"{raised.value!r} {raised.value.__context__!r}"


async def test_what_the_secrets_reader_says_itself_is_kept() -> None:
    """
    It knows best which setting is missing.
    """

    def missing() -> str:
        raise ConfigurationError("secret_missing", "There is no secret.")

    async with prepared(secret=missing) as setup:
        with pytest.raises(ConfigurationError) as raised:
            await setup.call()
        assert raised.value.code == "secret_missing"
        assert setup.authority.forms == []


async def test_closing_ends_a_renewal_under_way() -> None:
    """
    No task is left behind.
    """
    async with prepared() as setup:
        setup.authority.open.clear()
        call = asyncio.create_task(setup.call())
        await setup.authority.asked.wait()
        await setup.auth.aclose()
        await asyncio.wait({call})
        assert call.cancelled()
        assert setup.auth._renewal is None


def answer_with(**fields: object) -> bytes:
    """
    A good answer of the token endpoint, changed; None takes a field away.
    """
    good: dict[str, object] = {"token_type": "Bearer", "expires_in": 3599, "access_token": "abc"}
    return json.dumps({k: v for k, v in (good | fields).items() if v is not None}).encode()


@pytest.mark.parametrize(
    ("fields", "life_seconds"),
    [
        ({}, 3599),
        ({"expires_in": "3599"}, 3599),
        ({"expires_in": 0}, 0),
        ({"expires_in": 1.5}, 1.5),
        ({"expires_in": 10**40}, 86_400),
        ({"token_type": "bearer"}, 3599),
        ({"token_type": None}, 3599),
        ({"refresh_in": 1}, 3599),
    ],
)
def test_a_usable_token_is_taken_with_its_life(
    fields: dict[str, object], life_seconds: float
) -> None:
    """
    Counted from when it was asked for.
    """
    token = token_from_answer(answer_with(**fields), asked_at=50.0)
    assert token is not None
    assert token.value == "abc"
    assert token.expires_at == 50 + life_seconds
    assert token.renew_at == token.expires_at - min(300, life_seconds / 10)


@pytest.mark.parametrize(
    "fields",
    [
        {"access_token": None},
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": "a b"},
        {"access_token": "a\r\nX-Evil: 1"},
        {"access_token": "å"},
        {"expires_in": None},
        {"expires_in": True},
        {"expires_in": -1},
        {"expires_in": "soon"},
        {"expires_in": float("nan")},
        {"expires_in": [1]},
        {"token_type": "mac"},
        {"token_type": 1},
    ],
)
def test_an_answer_without_a_usable_token_is_none(fields: dict[str, object]) -> None:
    """
    A token that no header can carry is none either.
    """
    assert token_from_answer(answer_with(**fields), asked_at=0) is None


@pytest.mark.parametrize("body", [b"", b"[]", b'"token"', b"\xff", b"[" * 60_000, b"{}"])
def test_an_answer_that_is_no_object_is_none(body: bytes) -> None:
    """
    Whatever it is instead.
    """
    assert token_from_answer(body, asked_at=0) is None


def test_a_token_and_its_keeper_do_not_show_their_secrets() -> None:
    """
    A repr ends up in a log sooner or later.
    """
    token = AccessToken(value=SECRET, renew_at=1, expires_at=2)
    auth = Setup().auth
    auth._token = token
    assert SECRET not in f"{token!r} {token} {auth!r} {auth}"
    assert "client-1" in repr(auth)


@pytest.mark.parametrize("tenant", ["", "a/b", "../common", "a b", "-x", "a?b"])
def test_a_tenant_that_would_change_the_address_is_refused(tenant: str) -> None:
    """
    It becomes a part of the path that the secret is sent to.
    """
    with pytest.raises(ValueError, match="tenant"):
        EntraAuth(
            authority=AUTHORITY,
            tenant_id=tenant,
            client_id="client-1",
            secret=lambda: SECRET,
            resource=RESOURCE,
            http=Authority(),
        )

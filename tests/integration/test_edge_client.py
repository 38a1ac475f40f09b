"""
The worker's client of the Edge Function, against whatever may answer instead of it.
"""

from __future__ import annotations

import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from tests.integration.test_dynamics_client import (
    EVENT,
    GENEROUS_SECONDS,
    ROW,
    hangs,
    hangs_up,
    json_answer,
    resets,
    says,
    serving,
)
from worker.dynamics import DynamicsTarget, EdgeClient, EdgeKey, edge_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.integration.test_dynamics_client import Script, Server

HLF = UUID("00000000-0000-4000-8000-000000000001")
TARGET = DynamicsTarget(url="https://hlf.crm4.dynamics.example")
DELIVERED = json_answer("200 OK", {"outcome": "delivered"})
KEY = "canary-83c1-edge-key"
VERDICT = {
    "outcome": "failed",
    "class": "permanent",
    "code": "record_not_found",
    "message": "Dynamics has no record of this mentor (HTTP 404).",
    "retry_after": None,
    "doubtful": False,
}


@asynccontextmanager
async def client_of(
    url: str, read: Callable[[], str] = lambda: KEY, *, target: DynamicsTarget = TARGET
) -> AsyncIterator[EdgeClient]:
    """
    A client of whatever is at this address.
    """
    address = f"{url}/functions/v1/hlf-dynamics-sync"
    async with edge_client(
        target, organization_id=HLF, url=address, key=EdgeKey(address, read)
    ) as client:
        yield client


async def hide(client: EdgeClient, *, seconds: float = GENEROUS_SECONDS) -> None:
    """
    One request.
    """
    await client.set_visibility(ROW, visible=False, seconds=seconds, correlation_id=EVENT)


async def failure_of(
    *scripts: Script, seconds: float = GENEROUS_SECONDS, read: Callable[[], str] = lambda: KEY
) -> tuple[DeliveryError, Server]:
    """
    The error that a server with these scripts causes; the key is not in it.
    """
    async with serving(*scripts) as server, client_of(server.url, read) as client:
        with pytest.raises(DeliveryError) as raised:
            await hide(client, seconds=seconds)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert KEY not in f"{raised.value!r} {vars(raised.value)}"
    return raised.value, server


def answer(status: int, body: str = "", *headers: str) -> bytes:
    """
    An answer of the platform's.
    """
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body.encode()


# ------------------------------------------------------------------------- asking


async def test_a_question_is_exactly_this_request() -> None:
    """
    The key in its header, the rest in the body; the function has less time than we do.
    """
    async with serving(says(DELIVERED)) as server, client_of(server.url) as client:
        await hide(client, seconds=5)
    [(first, headers)] = server.heads
    assert first == "POST /functions/v1/hlf-dynamics-sync HTTP/1.1"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["content-type"] == "application/json"
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2]) == {
        "organization_id": str(HLF),
        "target": {
            "url": "https://hlf.crm4.dynamics.example",
            "entity_set": "contacts",
            "key": "",
            "column": "hlf_portalvisible",
            "operation": "patch",
            "action": "",
        },
        "seconds": 4.0,
        "change": {"row": str(ROW), "visible": False, "correlation_id": str(EVENT)},
    }


async def test_a_short_time_is_shared_and_not_used_up() -> None:
    """
    A fifth of it is for the answer to come back.
    """
    async with serving(says(DELIVERED)) as server, client_of(server.url) as client:
        await hide(client, seconds=2)
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["seconds"] == pytest.approx(1.6)


async def test_a_proof_asks_for_no_change() -> None:
    """
    And "delivered" is no answer to it.
    """
    ready = json_answer("200 OK", {"outcome": "ready"})
    async with serving(says(ready), says(DELIVERED)) as server, client_of(server.url) as client:
        await client.prove(seconds=GENEROUS_SECONDS)
        with pytest.raises(TransientError):
            await client.prove(seconds=GENEROUS_SECONDS)
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["change"] is None


async def test_what_is_no_guid_is_not_sent() -> None:
    """
    As on the direct road, unless there is an alternate key.
    """
    key = DynamicsTarget(url=TARGET.url, key="hlf_no")
    async with serving(says(DELIVERED)) as server, client_of(server.url) as client:
        with pytest.raises(ValueError, match="UUID"):
            await client.set_visibility("1)", visible=True, seconds=1, correlation_id=EVENT)
        assert not client.takes_mentor_id
        assert server.requests == []
        async with client_of(server.url, target=key) as other:
            assert other.takes_mentor_id
            await other.set_visibility("1)", visible=True, seconds=30, correlation_id=EVENT)


# ------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transient", TransientError),
        ("throttled", ThrottledError),
        ("permanent", PermanentError),
        ("configuration", ConfigurationError),
    ],
)
@pytest.mark.parametrize("doubtful", [True, False])
async def test_a_verdict_is_taken_as_it_is(
    name: str, kind: type[DeliveryError], *, doubtful: bool
) -> None:
    """
    Class, code, sentence and doubt: nothing is guessed.
    """
    verdict = VERDICT | {"class": name, "doubtful": doubtful, "retry_after": 7}
    error, _ = await failure_of(says(json_answer("200 OK", verdict)))
    assert type(error) is kind
    assert (error.code, error.doubtful) == ("record_not_found", doubtful)
    assert error.message == VERDICT["message"]
    if isinstance(error, ThrottledError):
        assert error.retry_after == 7


@pytest.mark.parametrize(
    ("raw", "wait"), [(0, 0), (2.5, 2.5), (9e9, 600), (-1, None), (None, None), ("7", None)]
)
async def test_the_wait_in_a_verdict_is_a_number_of_seconds_or_none(
    raw: object, wait: float | None
) -> None:
    """
    Ten minutes at most.
    """
    verdict = VERDICT | {"class": "throttled", "retry_after": raw}
    error, _ = await failure_of(says(json_answer("200 OK", verdict)))
    assert isinstance(error, ThrottledError)
    assert error.retry_after == wait


@pytest.mark.parametrize(
    "verdict",
    [
        {},
        "<html>",
        [VERDICT],
        {"outcome": "ready"},
        {"outcome": "unknown"},
        {"outcome": True},
        VERDICT | {"class": "fatal"},
        VERDICT | {"code": "Full Name"},
        VERDICT | {"code": 7},
        VERDICT | {"code": "x" * 65},
        VERDICT | {"message": None},
        VERDICT | {"doubtful": 0},
        {name: value for name, value in VERDICT.items() if name != "doubtful"},
    ],
    ids=str,
)
async def test_what_is_no_verdict_is_none(verdict: object) -> None:
    """
    Something else answers at this address; what became of the request nobody knows.
    """
    error, server = await failure_of(says(json_answer("200 OK", verdict)))
    assert isinstance(error, TransientError)
    assert error.code == "edge_unexpected_answer"
    assert error.doubtful
    assert len(server.requests) == 1


async def test_of_a_verdict_only_the_code_and_the_request_id_are_logged() -> None:
    """
    And that only if it is a GUID.
    """
    with capture_logs() as logs:
        for request_id in (str(EVENT), "Full Name"):
            verdict = VERDICT | {"service_request_id": request_id}
            await failure_of(says(json_answer("200 OK", verdict)))
    assert [log["service_request_id"] for log in logs] == [str(EVENT), None]
    assert [log["code"] for log in logs] == ["record_not_found"] * 2
    assert "Full Name" not in str(logs)


# ------------------------------------------------------------------------ platform


@pytest.mark.parametrize(
    ("status", "kind", "code", "doubtful"),
    [
        (200, TransientError, "edge_unexpected_answer", True),
        (204, TransientError, "edge_unexpected_answer", True),
        (302, ConfigurationError, "redirect_refused", False),
        (400, ConfigurationError, "edge_refused", False),
        (401, ConfigurationError, "edge_key_refused", False),
        (402, ConfigurationError, "edge_restricted", False),
        (403, ConfigurationError, "edge_refused", False),
        (404, ConfigurationError, "edge_missing", False),
        (405, ConfigurationError, "edge_refused", False),
        (408, TransientError, "edge_unavailable", True),
        (413, ConfigurationError, "edge_refused", False),
        (429, ThrottledError, "edge_throttled", False),
        (500, TransientError, "edge_failed", True),
        (502, TransientError, "edge_unavailable", True),
        (503, TransientError, "edge_unavailable", True),
        (504, TransientError, "edge_unavailable", True),
        (546, TransientError, "edge_stopped", True),
        (599, TransientError, "edge_failed", True),
    ],
)
@pytest.mark.parametrize("body", ["<html>", json.dumps(VERDICT)], ids=["html", "verdict"])
async def test_what_the_platform_says_is_never_about_a_mentor(
    status: int, kind: type[DeliveryError], code: str, body: str, *, doubtful: bool
) -> None:
    """
    A verdict comes with 200 alone; whatever may have run meanwhile is in doubt.
    """
    if status in {200, 204}:
        body = ""
    error, server = await failure_of(says(answer(status, body)))
    assert type(error) is kind
    assert (error.code, error.doubtful) == (code, doubtful)
    assert f"HTTP {status}" in error.message
    assert len(server.requests) == 1


async def test_the_platforms_retry_after_is_obeyed() -> None:
    """
    As Dynamics' own.
    """
    error, _ = await failure_of(says(answer(429, "", "Retry-After: 11")))
    assert isinstance(error, ThrottledError)
    assert error.retry_after == 11


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (resets, "edge_connection_lost"),
        (hangs_up, "edge_incomplete_answer"),
        (says(DELIVERED[:-1], then_close=True), "edge_incomplete_answer"),
        (hangs, "edge_timeout"),
    ],
    ids=["reset", "closed", "cut", "silent"],
)
async def test_an_answer_of_the_function_that_is_lost_is_doubtful(
    script: Script, code: str
) -> None:
    """
    It may have written the value.
    """
    error, server = await failure_of(script, seconds=1)
    assert isinstance(error, TransientError)
    assert error.code == code
    assert error.doubtful
    assert len(server.requests) == 1


async def test_a_function_that_nobody_serves_is_unreachable_and_not_doubtful() -> None:
    """
    Nothing was sent; and it is not Dynamics that is away.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with client_of(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(TransientError) as raised:
                await hide(client)
    assert raised.value.code == "edge_unreachable"
    assert not raised.value.doubtful


# ----------------------------------------------------------------------------- key


async def test_a_key_that_was_rotated_is_picked_up_when_the_old_one_is_refused() -> None:
    """
    It costs no attempt, and is kept.
    """
    keys = iter(["old", "new", "never"])
    async with (
        serving(says(answer(401)), says(DELIVERED)) as server,
        client_of(server.url, lambda: next(keys)) as client,
    ):
        await hide(client)
        await hide(client)
    sent = [headers["authorization"] for _, headers in server.heads]
    assert sent == ["Bearer old", "Bearer new", "Bearer new"]


async def test_a_key_that_is_refused_and_is_still_the_same_is_not_sent_again() -> None:
    """
    A person has to act.
    """
    error, server = await failure_of(says(answer(401)))
    assert isinstance(error, ConfigurationError)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["", "two words", f"{KEY}\n", "nøkkel"])
async def test_a_key_that_is_no_key_is_not_sent(key: str) -> None:
    """
    Nothing is.
    """
    error, server = await failure_of(says(DELIVERED), read=lambda: key)
    assert isinstance(error, ConfigurationError)
    assert error.code == "edge_key_unusable"
    assert server.requests == []


async def test_a_key_that_cannot_be_read_is_not_told_why_in_the_readers_words() -> None:
    """
    They may hold it.
    """

    def fail() -> str:
        raise OSError(KEY)

    error, _ = await failure_of(says(DELIVERED), read=fail)
    assert error.code == "edge_key_unusable"
    assert "OSError" in error.message


async def test_the_key_goes_to_one_address_only() -> None:
    """
    To no other function of the same project, even.
    """
    async with serving(says(DELIVERED)) as server:
        key = EdgeKey(f"{server.url}/one", lambda: KEY)
        async with edge_client(
            TARGET, organization_id=HLF, url=f"{server.url}/other", key=key
        ) as client:
            with pytest.raises(ConfigurationError) as raised:
                await hide(client)
    assert raised.value.code == "other_host"
    assert server.requests == []
    assert KEY not in repr(key)


@pytest.mark.parametrize(
    "url",
    [
        "http://hlf.functions.example/f",
        "hlf.functions.example",
        "https://anna:geheim@hlf.example/f",
        "https://hlf.example/f?geheim",
        "https://hlf.example:geheim/",
        "",
    ],
)
def test_a_key_goes_nowhere_without_https(url: str) -> None:
    """
    Plain http is for this machine; and what is wrong is not repeated.
    """
    with pytest.raises(ValueError, match="must") as raised:
        EdgeKey(url, lambda: KEY)
    assert "geheim" not in str(raised.value)

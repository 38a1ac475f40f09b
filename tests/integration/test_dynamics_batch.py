"""
A batch over a real socket: what is sent, and what each value's fate is when the answer is odd.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from outbox.errors import ConfigurationError, PermanentError, ThrottledError, TransientError
from tests.integration.test_dynamics_client import (
    EVENT,
    GENEROUS_SECONDS,
    ROW,
    _head,
    client_of,
    hangs,
    resets,
    says,
    serving,
)
from worker.dynamics.client import BatchRefusedError, Change

if TYPE_CHECKING:
    from outbox.errors import DeliveryError
    from tests.integration.test_dynamics_client import Script

OTHER = UUID("00000000-0000-4000-8000-0000000000a2")
THIRD = UUID("00000000-0000-4000-8000-0000000000a3")
DONE = "HTTP/1.1 204 No Content\r\nOData-Version: 4.0\r\n\r\n\r\n"
BUSY = "HTTP/1.1 503 Service Unavailable\r\n\r\n\r\n"
GONE = (
    "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n\r\n"
    '{"error":{"code":"0x80040217","message":"Does not exist."}}\r\n'
)


def batch_answer(*parts: str, cut: int = 0) -> bytes:
    """
    An answer of these parts, less so many bytes of its end.
    """
    pieces = [
        f"--b\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n\r\n{part}"
        for part in parts
    ]
    body = ("".join(pieces) + "--b--\r\n").encode()
    body = body[: len(body) - cut]
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary=b\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def fates(script: Script, *, seconds: float = GENEROUS_SECONDS) -> list[DeliveryError | None]:
    """
    What becomes of three values when a server answers like this.
    """
    changes = [Change(row=row, visible=False, correlation_id=EVENT) for row in (ROW, OTHER, THIRD)]
    async with serving(script) as server, client_of(server.url) as client:
        return await client.set_visibilities(changes, seconds=seconds)


async def test_a_batch_is_exactly_this_request() -> None:
    """
    The envelope, its headers, and every part to the byte.
    """
    change = Change(row=ROW, visible=False, correlation_id=EVENT)
    async with (
        serving(says(batch_answer(DONE))) as server,
        client_of(server.url) as client,
    ):
        await client.set_visibilities([change], seconds=GENEROUS_SECONDS)
    (request,) = server.requests
    first, headers = _head(request)
    body = request.partition(b"\r\n\r\n")[2].decode()

    assert first == "POST /api/data/v9.2/$batch HTTP/1.1"
    assert headers["prefer"] == "odata.continue-on-error"
    boundary = re.fullmatch(
        r'multipart/mixed; boundary="(batch_[0-9a-f-]{36})"', headers["content-type"]
    )
    assert boundary is not None
    [request_id] = re.findall(r"x-ms-client-request-id: (\S+)", body)
    assert body.replace(boundary[1], "B").replace(request_id, "ID") == (
        "--B\r\n"
        "Content-Type: application/http\r\n"
        "Content-Transfer-Encoding: binary\r\n"
        "\r\n"
        f"PATCH /api/data/v9.2/contacts({ROW}) HTTP/1.1\r\n"
        "Accept: application/json\r\n"
        "Content-Type: application/json\r\n"
        "OData-MaxVersion: 4.0\r\n"
        "OData-Version: 4.0\r\n"
        "x-ms-client-request-id: ID\r\n"
        f"x-ms-correlation-id: {EVENT}\r\n"
        "If-Match: *\r\n"
        "\r\n"
        '{"hlf_portalvisible":false}\r\n'
        "--B--\r\n"
    )


async def test_answers_are_matched_by_their_place() -> None:
    """
    Each value has its own fate.
    """
    first, second, third = await fates(says(batch_answer(DONE, GONE, BUSY)))

    assert first is None
    assert isinstance(second, PermanentError)
    assert isinstance(third, TransientError)


@pytest.mark.parametrize(
    "script",
    [
        says(batch_answer(DONE)),
        says(batch_answer(DONE, DONE, DONE, cut=len(DONE) * 2 + 100)),
        says(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\nhi!!"),
        says(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed\r\nContent-Length: 0\r\n\r\n"),
    ],
    ids=["too few", "cut short", "a web page", "empty"],
)
async def test_what_has_no_readable_answer_is_unknown_and_not_done(script: Script) -> None:
    """
    It may have taken effect, so a different state has to be said again later.
    """
    *_, last = await fates(script)

    assert isinstance(last, TransientError)
    assert last.doubtful


async def test_more_answers_than_values_are_ignored() -> None:
    """
    They are nobody's.
    """
    assert await fates(says(batch_answer(DONE, DONE, DONE, GONE))) == [None, None, None]


@pytest.mark.parametrize("script", [resets, hangs])
async def test_a_batch_without_an_answer_is_everybodys_doubt(script: Script) -> None:
    """
    The connection broke, or the deadline passed.
    """
    errors = await fates(script, seconds=1.0)

    assert [isinstance(error, TransientError) and error.doubtful for error in errors] == [True] * 3


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("429 Too Many Requests", ThrottledError),
        ("403 Forbidden", ConfigurationError),
        ("404 Not Found", ConfigurationError),
        ("503 Service Unavailable", TransientError),
    ],
)
async def test_what_concerns_everybody_is_said_to_everybody(
    status: str, expected: type[DeliveryError]
) -> None:
    """
    The whole batch met it.
    """
    errors = await fates(says(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()))

    assert [type(error) for error in errors] == [expected] * 3


@pytest.mark.parametrize("status", ["413 Content Too Large", "400 Bad Request"])
async def test_a_batch_that_is_refused_as_such_gives_nobody_up(status: str) -> None:
    """
    What is wrong with the batch is not wrong with a mentor.
    """
    script = says(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
    with pytest.raises(BatchRefusedError):
        await fates(script)

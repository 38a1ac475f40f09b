"""
The webhook: what is sent over a real socket, and what each answer means.
"""

from __future__ import annotations

import asyncio
import ssl
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from tests.receiver import SECRET, Receiver, as_json, receiving
from worker import credentials
from worker.webhook import ReminderWebhook, message_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REMINDER = {
    "certification_id": "0b7f3a52-54c4-4a3c-8a3c-0d2c9b2f6a10",
    "mentor_id": "7d0c1d8e-9f0a-4f39-8a53-2a2f2f1f6f11",
    "expires_on": "2026-12-31",
    "threshold_days": 30,
}
ENQUEUED_AT = datetime(2026, 12, 1, 3, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """
    The one that the receiver has.
    """
    monkeypatch.setenv("HLF_REMINDER_SECRET", SECRET)
    return monkeypatch


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """
    Takes everything.
    """
    async with receiving() as receiver:
        yield receiver


async def send(url: str, *, seconds: float = 10, tls: ssl.SSLContext | None = None) -> None:
    """
    Send the reminder once.
    """
    webhook = ReminderWebhook(url, sign=credentials.reminder_signature(), tls=tls)
    try:
        await webhook.send(REMINDER, enqueued_at=ENQUEUED_AT, seconds=seconds)
    finally:
        await webhook.aclose()


async def failure(url: str, *, seconds: float = 10) -> DeliveryError:
    """
    What sending raises; nothing secret hangs on it.
    """
    with pytest.raises(DeliveryError) as raised:
        await send(url, seconds=seconds)
    told = "".join(traceback.format_exception(raised.value))
    assert SECRET not in told
    assert SECRET.removeprefix("whsec_") not in told
    return raised.value


# ------------------------------------------------------------------------------ what is sent


async def test_a_reminder_is_one_signed_post_with_ids_dates_and_threshold(
    receiver: Receiver,
) -> None:
    """
    The specification's library, as receivers have it, accepts it.
    """
    await send(receiver.url)

    [message] = receiver.messages
    assert message.data == REMINDER
    assert as_json(message)["timestamp"] == ENQUEUED_AT.isoformat()
    assert message.path == "/hooks/reminders"
    assert message.headers["content-type"] == "application/json"
    assert "cookie" not in message.headers


async def test_the_id_stays_and_the_time_is_that_of_the_attempt(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    So a receiver can drop a repeat, and does not take an old one for a replay.
    """
    await send(receiver.url)
    await send(receiver.url)

    first, second = receiver.messages
    assert first.id == second.id
    assert first.body == second.body
    now = datetime.now(UTC).timestamp()
    assert abs(int(second.headers["webhook-timestamp"]) - now) < 60


@given(
    st.lists(
        st.tuples(st.uuids().map(str), st.integers(1, 999), st.dates().map(str)),
        unique=True,
        min_size=2,
    )
)
def test_ids_differ_by_certification_threshold_and_period(
    reminders: list[tuple[str, int, str]],
) -> None:
    """
    And depend on nothing else.
    """
    assert len({message_id(*one) for one in reminders}) == len(reminders)
    assert message_id(*reminders[0]) == message_id(*reminders[0])


async def test_a_rotated_secret_signs_the_next_reminder(
    receiver: Receiver, secret: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    Without a restart.
    """
    file = tmp_path / "secret"
    file.write_text("whsec_" + "QUFB" * 8, encoding="utf-8")
    secret.setenv("HLF_REMINDER_SECRET_FILE", str(file))
    webhook = ReminderWebhook(receiver.url, sign=credentials.reminder_signature())
    file.write_text(SECRET + "\n", encoding="utf-8")
    await webhook.send(REMINDER, enqueued_at=ENQUEUED_AT, seconds=10)
    assert receiver.messages[0].data == REMINDER

    file.unlink()
    with pytest.raises(ConfigurationError) as raised:
        await webhook.send(REMINDER, enqueued_at=ENQUEUED_AT, seconds=10)
    assert raised.value.code == "webhook_secret_missing"
    assert len(receiver.messages) == 1
    await webhook.aclose()


def test_the_webhook_shows_neither_path_nor_secret() -> None:
    """
    A path may be a secret of its own.
    """
    webhook = ReminderWebhook(
        "https://hooks.example/T0/canary-path", sign=credentials.reminder_signature()
    )
    assert repr(webhook) == "ReminderWebhook(host='hooks.example')"
    assert SECRET not in repr(vars(webhook))


# ----------------------------------------------------------------------- what an answer means


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_success(receiver: Receiver, status: int) -> None:
    """
    Receivers differ.
    """
    receiver.answer(status)
    await send(receiver.url)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (301, ConfigurationError, "webhook_wrong_address"),
        (302, ConfigurationError, "webhook_wrong_address"),
        (307, ConfigurationError, "webhook_wrong_address"),
        (400, PermanentError, "webhook_refused"),
        (401, ConfigurationError, "webhook_unauthorized"),
        (403, ConfigurationError, "webhook_unauthorized"),
        (404, ConfigurationError, "webhook_wrong_address"),
        (405, ConfigurationError, "webhook_wrong_address"),
        (408, TransientError, "webhook_unavailable"),
        (410, PermanentError, "webhook_refused"),
        (413, PermanentError, "webhook_refused"),
        (418, ConfigurationError, "webhook_wrong_address"),
        (422, PermanentError, "webhook_refused"),
        (425, TransientError, "webhook_unavailable"),
        (429, ThrottledError, "webhook_throttled"),
        (500, TransientError, "webhook_unavailable"),
        (502, TransientError, "webhook_unavailable"),
        (503, TransientError, "webhook_unavailable"),
        (599, TransientError, "webhook_unavailable"),
    ],
)
async def test_each_refusal_has_its_class_and_code(
    receiver: Receiver, status: int, kind: type[DeliveryError], code: str
) -> None:
    """
    One request, and no redirect is followed.
    """
    receiver.answer(status, Location=f"{receiver.url}/elsewhere")
    error = await failure(receiver.url)

    assert (type(error), error.code) == (kind, code)
    assert f"HTTP {status}" in error.message
    assert error.doubtful == isinstance(error, TransientError)
    assert len(receiver.messages) == 1


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("17", 17, 17),
        ("in two minutes", 1, 120),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("99999", 600, 600),
    ],
)
async def test_a_429_says_how_long_in_seconds_or_as_a_date(
    receiver: Receiver, value: str, low: float, high: float
) -> None:
    """
    Never longer than ten minutes at once.
    """
    if value == "in two minutes":
        value = format_datetime(datetime.now(UTC) + timedelta(minutes=2), usegmt=True)
    receiver.answer(429, Retry_After=value)
    error = await failure(receiver.url)

    assert isinstance(error, ThrottledError)
    assert error.retry_after is not None
    assert low <= error.retry_after <= high


async def test_a_429_may_leave_it_open(receiver: Receiver) -> None:
    """
    Then the relay decides.
    """
    receiver.answer(429)
    error = await failure(receiver.url)

    assert isinstance(error, ThrottledError)
    assert error.retry_after is None


async def test_an_endless_answer_is_cut(receiver: Receiver) -> None:
    """
    A success is one however much is said about it.
    """
    receiver.answers.append(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 10_000_000)
    await send(receiver.url)


# ----------------------------------------------------------------------------- without answer


@pytest.mark.parametrize(
    "answer", [None, b"HTTP/1.1 204", b"not http at all\r\n\r\n", b"HTTP/1.1 204 \xff\x00"]
)
async def test_an_answer_that_is_none_is_in_doubt(receiver: Receiver, answer: bytes | None) -> None:
    """
    The reminder may have been taken.
    """
    receiver.answers.append(answer)
    receiver.usual = None
    error = await failure(receiver.url, seconds=1)

    assert isinstance(error, TransientError)
    assert error.code in {"webhook_connection_lost", "webhook_timeout"}
    assert error.doubtful


async def test_a_webhook_that_never_answers_is_left_at_the_deadline() -> None:
    """
    In doubt too.
    """
    stop = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stop.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    error = await failure(f"http://127.0.0.1:{port}", seconds=0.1)
    stop.set()
    server.close()
    await server.wait_closed()

    assert (error.code, error.doubtful) == ("webhook_timeout", True)


async def test_nobody_there_is_no_doubt() -> None:
    """
    Nothing was sent.
    """
    error = await failure("http://127.0.0.1:9/hook")

    assert (error.code, error.doubtful) == ("webhook_unreachable", False)


async def test_a_certificate_has_to_be_trusted() -> None:
    """
    Over TLS to whom we trust; else our set-up is wrong, and nothing was sent.
    """
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async with receiving(server) as receiver:
        await send(receiver.url, tls=trusting)
        error = await failure(receiver.url)

    assert len(receiver.messages) == 1
    assert (type(error), error.code) == (ConfigurationError, "webhook_certificate")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example/reminders",
        "http://hooks.example/reminders",
        "ftp://hooks.example",
        "https://user:geheim@hooks.example/",
        "https://hooks.example/?token=geheim",
        "https://hooks.example/#geheim",
    ],
)
def test_an_address_that_no_secret_may_go_to_is_refused(url: str) -> None:
    """
    Without repeating it.
    """
    with pytest.raises(ValueError, match="HLF_REMINDER_URL must") as raised:
        ReminderWebhook(url, sign=credentials.reminder_signature())
    assert "geheim" not in str(raised.value)

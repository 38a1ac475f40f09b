"""
Logs: readable or JSON, on stderr, and never the value of a variable.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import pytest
import structlog
from sqlalchemy.exc import IntegrityError

from outbox import Delivered
from outbox.attempt import attempt
from tests.unit.test_architecture import sources
from tests.unit.test_outbox_attempt import destination
from tests.unit.test_outbox_attempt import event as attempted
from worker import logs, redaction
from worker.cli import running
from worker.errors import SettingsError
from worker.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from outbox import Event

FORMATS: tuple[Literal["console", "json"], ...] = ("console", "json")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """
    Other tests log as they did.
    """
    levels = {name: logging.getLogger(name).level for name in logs.QUIET}
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    logging.raiseExceptions = True
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if one.get_name() != logs.HANDLER]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _fail(canary: str) -> None:
    secret = canary
    raise ValueError(f"{len(secret)} characters are too many")


def _fail_under_a_group(canary: str) -> None:
    secret = canary
    try:
        _fail(secret)
    except ValueError as error:
        raise ExceptionGroup("several", [error]) from error


def test_console_lines_are_for_people_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """
    What happened, with its details; stdout is for the results of commands.
    """
    logs.configure("console")
    structlog.get_logger("x").info("worker.started", concurrency=8)

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "worker.started" in printed.err
    assert "concurrency=8" in printed.err
    assert "\x1b" not in printed.err  # no colours where there is no terminal


def test_json_is_one_document_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """
    With time, level and the event, whatever is in it.
    """
    logs.configure("json")
    structlog.get_logger("x").warning("gate.closed", message="two\nlines", attempt=3)

    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "gate.closed",
        "level": "warning",
        "message": "two\nlines",
        "attempt": 3,
    }


@pytest.mark.parametrize("fail", [_fail, _fail_under_a_group])
@pytest.mark.parametrize("log_format", FORMATS)
def test_a_trace_shows_where_and_no_value(
    capsys: pytest.CaptureFixture[str],
    log_format: Literal["console", "json"],
    fail: object,
) -> None:
    """
    Neither of a variable, also with rich installed, which would print them all, nor in the
    sentence of an exception that is not ours.
    """
    assert callable(fail)
    logs.configure(log_format)
    canary = "canary-" + "local"
    try:
        fail(canary)
    except (ValueError, ExceptionGroup):
        structlog.get_logger("x").exception("outbox.settle_failed")

    printed = capsys.readouterr().err
    assert "rich" in sys.modules
    assert "ValueError" in printed
    assert "tests.unit.test_logs" in printed
    assert "_fail" in printed
    assert "characters are too many" not in printed
    assert canary not in printed


@pytest.mark.parametrize("log_format", FORMATS)
def test_libraries_are_quiet_below_a_warning(
    capsys: pytest.CaptureFixture[str], log_format: Literal["console", "json"]
) -> None:
    """
    Addresses and statements that they would log at info stay unsaid.
    """
    logs.configure(log_format)
    for name in ("aiohttp.client", "sqlalchemy.engine.Engine", "psycopg.pool"):
        logger = logging.getLogger(name)
        assert not logger.isEnabledFor(logging.INFO)
        assert logger.isEnabledFor(logging.WARNING)
        logger.info("https://host/secret")
    assert capsys.readouterr().err == ""


def test_a_level_leaves_out_what_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    """
    The doctor asks for errors only.
    """
    logs.configure("console", level=logging.ERROR)
    structlog.get_logger("x").warning("not.said")
    structlog.get_logger("x").error("said")
    assert "not.said" not in (printed := capsys.readouterr().err)
    assert "said" in printed


@pytest.mark.parametrize("log_format", FORMATS)
def test_without_a_stderr_nothing_is_logged_and_nothing_fails(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    log_format: Literal["console", "json"],
) -> None:
    """
    A service may be started with it closed; stdout does not stand in for it.
    """
    monkeypatch.setattr(sys, "stderr", None)
    logs.configure(log_format)
    structlog.get_logger("x").warning("unheard")
    monkeypatch.undo()
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------- redaction


def entries(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """
    What was logged as JSON; each line is a document.
    """
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def fields_of(function: ast.AST) -> Iterator[str]:
    """
    The keys that code hands to a log or binds to all that follow.
    """
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.startswith("log.") or name.endswith(("bind_contextvars", "bound_contextvars")):
            yield from (one.arg or f"**{ast.unparse(one.value)}" for one in node.keywords)


SPREAD = {
    "**self._destination.about(flight.event)",
    "**self._destination.about(landed[0].event)",
    "**self._destination.about(one.event)",
    "**total((relay.tally for relay in relays))",
}
"""Whose keys are not to be read off; those are below."""


def test_every_key_that_our_code_logs_is_known() -> None:
    """
    A new one is thought about before its value is told to anybody.
    """
    used = {key for _, module in sources("outbox", "worker") for key in fields_of(module)}

    assert used - SPREAD - {"exc_info"} <= redaction.KNOWN
    assert used >= SPREAD
    assert {"event_id", "version", "attempt", "key", "mentor_id", "certification_id"} <= (
        redaction.KNOWN
    )
    assert set(running.TALLY) <= redaction.KNOWN


def test_the_value_of_an_unknown_key_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Only that there was one.
    """
    logs.configure("json")
    structlog.get_logger("x").info("said", full_name="canary", message={"a": "canary"})

    [entry] = entries(capsys)
    assert (entry["full_name"], entry["message"]) == ("[redacted]", "[redacted]")


@pytest.mark.parametrize(
    "words",
    [
        "Authorization: Bearer canary.abc",
        "eyJcanary.eyJhIjoxfQ.c2ln",
        "postgresql://me:canary@host/x",
        "postgresql://me:half@canary@host/x",
        "client_secret=canary&grant_type=x",
        'answered {"password": "canary"}',
        "whsec_canary",
        "Basic Y2FuYXJ5OmNhbmFyeTpjYW5hcnk6Y2FuYXJ5canary",
    ],
)
def test_what_looks_like_a_secret_is_taken_out_wherever_it_stands(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    """
    The rest of the sentence stays.
    """
    logs.configure("json")
    structlog.get_logger("x").info("said", message=f"Before {words}", reason=[words])

    [entry] = entries(capsys)
    assert "canary" not in json.dumps(entry)
    assert entry["message"].startswith("Before ")


def test_a_text_is_no_longer_than_anybody_reads(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Whatever was answered.
    """
    logs.configure("json")
    structlog.get_logger("x").info("said", message="x" * 10_000, mentors=["y"] * 1000)

    [entry] = entries(capsys)
    assert len(entry["message"]) == redaction.LONGEST + 1
    assert len(entry["mentors"]) == redaction.MOST


def test_the_sentence_of_our_own_exception_is_told_and_its_cause_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    What it came from is foreign, and says only what it is.
    """
    logs.configure("json")
    try:
        try:
            _fail("canary")
        except ValueError as cause:
            raise SettingsError("HLF_SYNC_BATCH must be 1.") from cause
    except SettingsError:
        structlog.get_logger("x").exception("failed")

    [entry] = entries(capsys)
    told = entry["exception"]
    assert (told["type"], told["message"]) == (
        "worker.errors.SettingsError",
        "HLF_SYNC_BATCH must be 1.",
    )
    assert told["cause"]["type"] == "ValueError"
    assert "message" not in told["cause"]
    assert "canary" not in json.dumps(entry)


def test_an_error_of_the_database_has_its_sqlstate(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Which says more than its class, and holds no row.
    """
    logs.configure("json")
    error = IntegrityError("INSERT", {}, psycopg.errors.UniqueViolation("Key (id)=(canary)"))
    structlog.get_logger("x").error("failed", exc_info=error)

    [entry] = entries(capsys)
    assert entry["exception"]["sqlstate"] == "23505"
    assert "canary" not in json.dumps(entry)


# ---------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("name", ["aiohttp", "uvicorn.error", "asyncio", "somebody.else"])
def test_a_librarys_warning_is_a_line_like_ours(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """
    JSON, with its logger's name, through the same redaction, and no more than a line of it.
    """
    logs.configure("json")
    logging.getLogger(name).warning("Gone: %s\n<Task exception=canary>", "token=canary")

    [entry] = entries(capsys)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": "Gone: [redacted]", "level": "warning", "logger": name}


def test_a_librarys_exception_is_told_like_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Where, and no value.
    """
    logs.configure("json")
    try:
        _fail("canary")
    except ValueError:
        logging.getLogger("asyncio").exception("Task exception was never retrieved")

    [entry] = entries(capsys)
    assert entry["exception"]["type"] == "ValueError"
    assert entry["exception"]["frames"][-1]["function"] == "_fail"


def test_pythons_warnings_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Nothing but JSON comes out of a process that logs JSON.
    """
    logs.configure("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)

    [entry] = entries(capsys)
    assert entry["logger"] == "py.warnings"
    assert entry["event"].endswith("DeprecationWarning: old")


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_stderr_that_breaks_off_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, log_format: Literal["console", "json"]
) -> None:
    """
    A full disk, or a reader that is gone.
    """
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        logs.configure(log_format)
        structlog.get_logger("x").warning("unheard")
        logging.getLogger("x").warning("unheard")
        patch.undo()
        with suppress(BrokenPipeError):
            stream.close()


# --------------------------------------------------------------------------- isolation


async def test_what_is_logged_of_an_attempt_is_never_about_another_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    Two at once, interleaved; and what is done for both is logged as neither's.
    """
    logs.configure("json")
    log = structlog.get_logger("x")

    async def together(mentors: Sequence[str]) -> list[None]:
        log.info("together", mentors=list(mentors))
        return [None] * len(mentors)

    gathering: Gathering[str, None] = Gathering(together, most=2, seconds=1)

    async def deliver(event: Event, _seconds: float) -> Delivered:
        log.info("before", message=event.key)
        await gathering(event.key)
        log.info("after", message=event.key)
        return Delivered()

    one = destination(deliver, names=lambda event: {"mentor_id": event.key})
    async with asyncio.TaskGroup() as tasks:
        for number, key in enumerate(("a", "b")):
            tasks.create_task(
                attempt(attempted(id=number, key=key), one, claimed_at=time.monotonic())
            )
    log.info("done")

    said = entries(capsys)
    of_attempts = [entry for entry in said if entry["event"] in {"before", "after"}]
    assert len(of_attempts) == 4
    for entry in of_attempts:
        assert entry["mentor_id"] == entry["message"]
        assert (entry["event_id"], entry["attempt"]) == ("ab".index(entry["message"]), 1)
    for entry in said:
        if entry["event"] in {"together", "done"}:
            assert entry.keys() & {"event_id", "mentor_id", "attempt"} == set()

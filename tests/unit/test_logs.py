"""
Logs: readable or JSON, on stderr, and never the value of a variable.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Literal

import pytest
import structlog

from worker import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS: tuple[Literal["console", "json"], ...] = ("console", "json")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """
    Other tests log as they did.
    """
    levels = {name: logging.getLogger(name).level for name in logs.QUIET}
    yield
    structlog.reset_defaults()
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
    structlog.get_logger("x").warning("gate.closed", message="two\nlines", number=3)

    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "gate.closed",
        "level": "warning",
        "message": "two\nlines",
        "number": 3,
    }


@pytest.mark.parametrize("fail", [_fail, _fail_under_a_group])
@pytest.mark.parametrize("log_format", FORMATS)
def test_a_trace_shows_no_variable(
    capsys: pytest.CaptureFixture[str],
    log_format: Literal["console", "json"],
    fail: object,
) -> None:
    """
    Also with rich installed, which would print all locals: the lines, but not one value.
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
    assert "characters are too many" in printed
    assert "_fail" in printed
    assert canary not in printed
    assert '"locals"' not in printed


@pytest.mark.parametrize("log_format", FORMATS)
def test_libraries_are_quiet_below_a_warning(
    capsys: pytest.CaptureFixture[str], log_format: Literal["console", "json"]
) -> None:
    """
    Addresses and statements that they would log at info stay unsaid.
    """
    logs.configure(log_format)
    for name in ("httpx", "httpcore.connection", "sqlalchemy.engine.Engine", "psycopg.pool"):
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

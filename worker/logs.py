"""
Logs: on stderr, for people or as JSON lines; never a local variable, never a secret.

What libraries log takes the same way as what we log ourselves: of their messages the first line,
as more than that is often somebody's `repr`.
"""

from __future__ import annotations

import io
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from typing_extensions import override

from outbox import about_the_attempt
from worker import redaction

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

QUIET = ("aiohttp", "sqlalchemy", "psycopg", "asyncio", "alembic")
"""Libraries of which only warnings are of interest; some would log addresses."""

SILENT = ("opentelemetry.util.re",)
"""Libraries that repeat what they cannot read, and it may be a secret."""

BESIDE = "opentelemetry"
"""Whose trouble is logged and not reported: traces that get lost are nothing unexpected."""

HANDLER = "hlf-sync"
"""Name of the handler that is ours."""


def configure(
    log_format: Literal["console", "json"],
    *,
    level: int = logging.INFO,
    report: Callable[[EventDict], None] | None = None,
) -> None:
    """
    Set up logging for this process, that of libraries included.

    Args:
        report: given each error, after everything was taken out that nobody may see.
    """
    stream = _Heedless(sys.stderr or io.StringIO())  # None when it was closed before we began
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        about_the_attempt,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = [_known_only, _tell_exception]
    if report is not None:
        last.append(partial(_report, report))
    if log_format == "json":
        last.append(structlog.processors.JSONRenderer())
    else:
        last += [_exception_in_lines, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stream)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.set_name(HANDLER)
    handler.setLevel(level)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, _first_line, *shared],
            processors=[ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if one.get_name() != HANDLER] + [handler]
    logging.raiseExceptions = False  # a record that cannot be written is nobody's trace
    logging.captureWarnings(capture=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class _Heedless(io.TextIOBase):
    """
    A stream whose end, or full disk, stops nobody who writes to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @override
    def write(self, words: str, /) -> int:
        try:
            return self._stream.write(words)
        except (OSError, ValueError):
            return 0

    @override
    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    @override
    def isatty(self) -> bool:
        return self._stream.isatty()


def _first_line(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
    """
    Of a library's message.
    """
    lines = str(fields["event"]).splitlines()
    fields["event"] = lines[0] if lines else ""
    return fields


def _known_only(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
    """
    Tell only what is known to be harmless; an exception comes after it.
    """
    exc_info = fields.pop("exc_info", None)
    known = redaction.known_only(fields)
    return known | {"exc_info": exc_info} if exc_info else known


def _tell_exception(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
    """
    What an exception is and where, without its values.
    """
    error = _exception_of(fields.pop("exc_info", None))
    if error is not None:
        fields["exception"] = redaction.told(error)
    return fields


def _report(
    report: Callable[[EventDict], None], _logger: WrappedLogger, _method: str, fields: EventDict
) -> EventDict:
    beside = str(fields.get("logger", "")).startswith(BESIDE)
    if fields.get("level") in {"error", "critical"} and not beside:
        report(fields)
    return fields


def _exception_of(
    given: ExcInfo | BaseException | Literal[True] | None,
) -> BaseException | None:
    """
    In whatever form it was handed over.
    """
    match given:
        case BaseException():
            return given
        case (_, error, _):
            return error
        case _:
            return sys.exception() if given is not None else None


def _exception_in_lines(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
    """
    For people.
    """
    if isinstance(told := fields.get("exception"), dict):
        fields["exception"] = "\n".join(_lines(told))
    return fields


def _lines(told: dict[str, Any], indent: str = "") -> list[str]:
    says = " ".join(str(told[key]) for key in ("message", "sqlstate") if key in told)
    lines = [f"{indent}{told['type']}{': ' if says else ''}{says}"]
    frame = "{indent}  at {module}:{line} {function}"
    lines += [frame.format(indent=indent, **one) for one in told["frames"]]
    for part in told.get("parts", []):
        lines += _lines(part, f"{indent}  | ")
    if "cause" in told:
        lines += [f"{indent}caused by", *_lines(told["cause"], indent)]
    return lines

"""
Logs: on stderr, for people or as JSON lines; never a local variable, never a secret.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor

QUIET = ("httpx", "httpcore", "sqlalchemy", "psycopg", "asyncio", "alembic")
"""Libraries of which only warnings are of interest; some would log addresses."""


def configure(log_format: Literal["console", "json"], *, level: int = logging.INFO) -> None:
    """
    Set up logging for this process.

    Tracebacks show lines, never the values of variables: one of them may be a secret.
    """
    stream = sys.stderr or io.StringIO()  # None when it was closed before we began
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor]
    if log_format == "json":
        renderers = [
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(),
        ]
    else:
        renderers = [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)

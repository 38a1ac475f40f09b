"""
One run of a command: settings, printing, and errors that become a sentence.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import sys
from contextlib import closing
from datetime import date, datetime
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec
from zoneinfo import ZoneInfo

import click
import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.contextvars import bound_contextvars

from worker import bootstrap, logs
from worker.database import no_entry, refusal
from worker.errors import SyncError
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from uuid import UUID

    from worker.process import Verdict

log = structlog.get_logger(__name__)

P = ParamSpec("P")

OK = 0
NEEDS_A_PERSON = 3
UNREACHABLE = 69
WORK_LEFT = 75
CONFIGURATION = 78
UNEXPECTED = 1
INTERRUPTED = 130  # 128 and SIGINT, as shells count

EXIT_CODES: Mapping[Verdict, int] = {
    "done": OK,
    "unexpected": UNEXPECTED,
    "needs_a_person": NEEDS_A_PERSON,
    "unreachable": UNREACHABLE,
    "work_left": WORK_LEFT,
    "configuration": CONFIGURATION,
}


class Session:
    """
    One run of a command: its settings and its way of printing.

    Args:
        as_json: print one JSON document instead of sentences.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.settings = Settings.load()
        self.reports = bootstrap.error_reports()
        logs.configure(self.settings.log_format, report=self.reports)

    @property
    def organization_id(self) -> UUID:
        """
        Whose mentors this process serves.
        """
        return self.settings.organization_id

    def report(self, document: dict[str, Any], *sentences: str) -> None:
        """
        Print the result, once.
        """
        if self.as_json:
            click.echo(json.dumps(document, default=_jsonable))
        else:
            for sentence in sentences:
                click.echo(sentence)

    def close(self) -> None:
        """
        Send what was reported last.
        """
        if self.reports is not None:
            self.reports.close()

    def clock(self, moment: datetime | None) -> str:
        """
        A moment as people of the organisation read it.
        """
        if moment is None:
            return "unknown"
        local = moment.astimezone(ZoneInfo(self.settings.timezone))
        today = datetime.now(local.tzinfo).date()
        return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M")


def _jsonable(value: object) -> str:
    if isinstance(value, datetime | date):
        return value.isoformat()
    return str(value)


def command(
    function: Callable[Concatenate[Session, P], Coroutine[None, None, int]],
) -> Callable[..., None]:
    """
    A command that prints one result and exits by its meaning.

    What a person can do something about becomes one sentence, never a trace.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.pop("as_json"))
        try:
            session = Session(as_json=as_json)
            # Whatever is logged meanwhile says whose it is.
            with closing(session), bound_contextvars(organization_id=str(session.organization_id)):
                code = _outcome(session, function(session, *args, **kwargs))
        except SyncError as error:
            code = fail(str(error), error.exit_code, as_json=as_json)
        sys.exit(code)

    option = click.option("--json", "as_json", is_flag=True, help="One JSON document, not text.")
    return option(update_wrapper(run, function))


def _outcome(session: Session, running: Coroutine[None, None, int]) -> int:
    """
    Run a command; the code to exit by, whatever becomes of it.

    Raises:
        SyncError: what a person can do something about.
    """
    try:
        return asyncio.run(running)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SyncError:
        raise
    except (PoolTimeout, TimeoutError) as error:
        return fail(_lost(error), UNREACHABLE, as_json=session.as_json)
    except Exception as error:
        if sentence := refusal(error):
            return fail(sentence, CONFIGURATION, as_json=session.as_json)
        if isinstance(error, DBAPIError) and _is_lost_connection(error):
            return fail(_lost(error), UNREACHABLE, as_json=session.as_json)
        log.exception("command.failed")
        sentence = f"Something unexpected happened ({type(error).__name__}); the log has more."
        return fail(sentence, UNEXPECTED, as_json=session.as_json)


def _is_lost_connection(error: DBAPIError) -> bool:
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


def _lost(error: Exception) -> str:
    why = no_entry(error) or "stopped answering"
    return f"The database {why}. What was committed stands; run the command again."


def fail(sentence: str, code: int, *, as_json: bool) -> int:
    """
    Say what is wrong, on stderr and in the document, and return the exit code.
    """
    if as_json:
        click.echo(json.dumps({"error": sentence, "exit_code": code}))
    click.echo(f"Error: {sentence}", err=True)
    return code


def actor() -> str:
    """
    Who runs this command; in a container the user may have no name.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def many(number: int, noun: str) -> str:
    """
    "1 mentor", "2 mentors".
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(words: str) -> str:
    """
    Without line breaks, terminal codes and broken characters.
    """
    harmless = (letter for letter in words if letter.isprintable() or letter.isspace())
    return " ".join("".join(harmless).split())

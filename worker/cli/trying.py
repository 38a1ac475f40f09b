"""
For trying: `sandbox` and `demo`. Neither needs any setting.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from worker.cli.session import CONFIGURATION
from worker.dynamics import sandbox as pretend
from worker.errors import SyncError


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback only.")
@click.option("--port", default=0, show_default=True, help="0 takes any free one.")
@click.option("--ledger", type=click.Path(path_type=Path), help="Also write the ledger here.")
@click.option("--tenant", default=pretend.DEFAULT_TENANT, show_default=True)
@click.option("--client-id", default=pretend.DEFAULT_CLIENT_ID, show_default=True)
@click.option(
    "--client-secret",
    default=pretend.DEFAULT_CLIENT_SECRET,
    show_default=True,
    help="A pretend one: never give a real secret on a command line.",
)
@click.option("--entity-set", default=pretend.DEFAULT_ENTITY_SET, show_default=True)
@click.option("--key", help="Column of an alternate key.")
@click.option("--column", default=pretend.DEFAULT_COLUMN, show_default=True)
@click.option("--action", default=pretend.DEFAULT_ACTION, show_default=True)
@click.option("--latency", default=0.0, show_default=True, help="Seconds each answer takes.")
@click.option("--accept-any-row", is_flag=True, help="Every id is an existing row.")
def sandbox(**options: Any) -> None:  # noqa: ANN401 (checked by click)
    """
    A pretend Entra ID and Dataverse on loopback, with faults to order.

    Prints one line of JSON when it listens. `/_sandbox/health`, `/_sandbox/ledger`,
    `/_sandbox/rows` and `/_sandbox/faults` control it.
    """
    with suppress(KeyboardInterrupt):
        try:
            asyncio.run(_serve(_options(options)))
        except pretend.SandboxError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(CONFIGURATION)


def _options(options: dict[str, Any]) -> pretend.Options:
    renamed = {"ledger": "ledger_path", "latency": "latency_seconds"}
    return pretend.Options(**{renamed.get(name, name): value for name, value in options.items()})


async def _serve(options: pretend.Options) -> None:
    """
    Serve until SIGTERM or SIGINT.
    """
    serving = asyncio.ensure_future(pretend.run(options))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving


@click.command()
@click.option("--check", is_flag=True, help="Print the checked claims only; exit 1 if one fails.")
def demo(*, check: bool) -> None:
    """
    Everything at once on this machine: watch mentors expire, Dynamics fail, a worker die.

    On a terminal the coordinator's page stays open at the end, until Ctrl+C.
    """
    # No other command waits for what only the story needs.
    from worker.demo import tell_story  # noqa: PLC0415

    for number in ENDINGS:
        signal.signal(number, _end_once)
    try:
        if check:
            claims = tell_story(_silence)
        else:
            claims = tell_story(click.echo, stay=_stay if sys.stdout.isatty() else None)
    except SyncError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    if check:
        for sentence, holds in claims:
            click.echo(f"{'ok' if holds else 'FAILED':<7}{sentence}")
    failed = [sentence for sentence, holds in claims if not holds]
    if failed:
        click.echo(f"\n{len(failed)} of {len(claims)} claims did not hold.", err=True)
        sys.exit(1)
    click.echo(f"\nAll {len(claims)} claims held. Nothing was lost.")


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end_once(number: int, _frame: object) -> NoReturn:
    """
    Leave by an exception, so that everything that was started is taken down; once, so that
    an impatient second signal does not interrupt just that.
    """
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


class _EnoughError(Exception):
    """
    Whoever watches has seen enough.
    """


def _stay() -> None:
    """
    Return when somebody ends the demo: that is no failure of it.
    """

    def enough(_number: int, _frame: object) -> NoReturn:
        for each in ENDINGS:
            signal.signal(each, signal.SIG_IGN)
        raise _EnoughError

    for number in ENDINGS:
        signal.signal(number, enough)
    with suppress(_EnoughError):
        while True:
            signal.pause()


def _silence(_: str) -> None:
    """
    The story untold.
    """

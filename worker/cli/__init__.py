"""
The commands: what they take, what they print, and how they exit.

    0 done · 1 unexpected · 2 usage · 3 done, but open failures need a person ·
    69 database or Dynamics unreachable, or held by somebody · 75 work left · 78 configuration
"""

from __future__ import annotations

import io
import sys

import click

from worker.cli.certifying import expire, remind, renew
from worker.cli.coordinating import failures, retry, status
from worker.cli.night import nightly
from worker.cli.operating import doctor, pause, resume, resync
from worker.cli.running import drain, worker
from worker.cli.showing import dashboard
from worker.cli.trying import demo, sandbox


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hlf-dynamics-sync")
def cli() -> None:
    """
    Keep HLF's portal showing exactly the mentors whose certification is valid.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no "→" shows a "?"; no command fails for that.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


for command in (
    worker,
    drain,
    nightly,
    expire,
    renew,
    remind,
    status,
    failures,
    retry,
    pause,
    resume,
    resync,
    dashboard,
    doctor,
    sandbox,
    demo,
):
    cli.add_command(command)

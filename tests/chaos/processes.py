"""
The processes of an installation: forked from one that has everything imported, or cold.

A forked one costs milliseconds where a cold one costs a second, so many more can be killed;
what runs in it is the same: `hlf-sync COMMAND`, with failpoints, or a producer.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos import producer
from tests.chaos.failpoints import Arming, Failpoints, Scale, install

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.context import ForkServerProcess

PRODUCE = "produce"
"""Not a command of the product: expire and renew for a while."""

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """
    What a process is to do.

    Args:
        arguments: of `hlf-sync`, or `PRODUCE` and the producer's orders as JSON.
        environment: all of it.
        output: file for what it prints.
        fired: folder of the failpoints that went off.
        armed: failpoints, by mentor.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    output: str
    fired: str
    armed: Mapping[str, Arming] = field(default_factory=dict)
    scale: Scale = field(default_factory=Scale)


class Process:
    """
    A process that runs, or has ended.

    Attributes:
        pid: while it runs, and afterwards.
        output: file of what it prints.
    """

    def __init__(self, spec: Spec, handle: ForkServerProcess | asyncio.subprocess.Process) -> None:
        self._handle = handle
        assert handle.pid is not None
        self.pid = handle.pid
        self.output = Path(spec.output)

    @property
    def code(self) -> int | None:
        """
        How it ended: an exit code, or a signal's number, negative; None while it runs.
        """
        if isinstance(self._handle, asyncio.subprocess.Process):
            return self._handle.returncode
        return self._handle.exitcode

    def send(self, number: int) -> None:
        """
        Send a signal, if it still runs.
        """
        if self.code is None:
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """
        Wait for its end.
        """
        if isinstance(self._handle, asyncio.subprocess.Process):
            return await self._handle.wait()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._handle.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._handle.sentinel)
        self._handle.join()
        code = self._handle.exitcode
        assert code is not None
        return code

    @property
    def memory(self) -> int:
        """
        Resident bytes now; 0 if it has ended.
        """
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def preload() -> None:
    """
    Have the fork server import everything that its children need.
    """
    _context.set_forkserver_preload(["tests.chaos.processes", "worker.cli"])


async def fork(spec: Spec) -> Process:
    """
    Start a process from the fork server.
    """
    handle = _context.Process(target=run, args=(spec,))
    await asyncio.to_thread(handle.start)
    return Process(spec, handle)


async def start_cold(spec: Spec) -> Process:
    """
    Start a process that imports everything anew.
    """
    handle = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.processes", json.dumps(asdict(spec))
    )
    return Process(spec, handle)


def run(spec: Spec) -> None:
    """
    Be that process.
    """
    from worker.__main__ import main  # noqa: PLC0415 (the fork server has it already)

    _write_to(spec.output)
    os.environ.clear()
    os.environ.update(spec.environment)
    points = Failpoints(spec.armed, Path(spec.fired))
    command, *arguments = spec.arguments
    if command == PRODUCE:
        producer.run(producer.Orders.from_json(arguments[0]), points)
        return
    install(points, spec.scale)
    sys.argv[1:] = spec.arguments
    main()


def _write_to(path: str) -> None:
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _read(document: str) -> Spec:
    fields: dict[str, Any] = json.loads(document)
    fields["arguments"] = tuple(fields["arguments"])
    fields["armed"] = {key: Arming(**arming) for key, arming in fields["armed"].items()}
    fields["scale"] = Scale(**fields["scale"])
    return Spec(**fields)


if __name__ == "__main__":
    run(_read(sys.argv[1]))

"""
The stub (`tests.bench.stub`) as a process, and the questions to it.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from tests.bench.processes import python, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FarSide:
    """
    What stands for Dynamics.
    """

    port: int
    pid: int

    @property
    def url(self) -> str:
        """
        For contenders.
        """
        return f"http://127.0.0.1:{self.port}"

    def reset(self, *, latency_ms: float = 0, keep: bool = False) -> None:
        """
        Begin to count anew.

        Args:
            latency_ms: of each answer from now on.
            keep: the arrival of each key, too.
        """
        self._ask("POST", "/reset", {"latency_ms": latency_ms, "keep": keep})

    def counted(self) -> dict[str, int]:
        """
        Since the last reset.
        """
        counted: dict[str, int] = self._ask("GET", "/counted")
        return counted

    def arrivals(self) -> list[tuple[int, str]]:
        """
        When each key came, in nanoseconds.
        """
        return [(when, key) for when, key in self._ask("GET", "/arrivals")]

    def _ask(self, method: str, path: str, document: object = None) -> Any:  # noqa: ANN401 (JSON)
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, json.dumps(document) if document else None)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@asynccontextmanager
async def open_far_side() -> AsyncIterator[FarSide]:
    """
    The stub, until the block ends.
    """
    async with running(python("tests.bench.stub")) as process:
        where = json.loads(await process.first_line())
        yield FarSide(port=where["port"], pid=process.pid)

"""
What takes part in a measurement, ours like a peer: the same work, told in processes.

A contender keeps its events in the database it is given and delivers each as one
`PATCH {api_url}/api/data/v9.2/contacts({key})` with the body `{"hlf_portalvisible": false}`.
All its processes get their part from the environment:

    BENCH_DATABASE_URL   postgresql://…
    BENCH_API_URL        http://127.0.0.1:port of the stub
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Contender(Protocol):
    """
    One system in one configuration; its name says both, as in `graphile-worker:tuned`.
    """

    name: str

    def missing(self) -> str | None:
        """
        Why it cannot take part on this machine (no Node, not installed), or None.
        """

    def prepare(self, database_url: str) -> None:
        """
        Make its tables in an empty database.
        """

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        Enqueue one event for each key, committed, in bulk; then ANALYZE its tables.
        """

    def left(self, database_url: str) -> int:
        """
        How many events are not durably done yet.
        """

    def worker(self, *, concurrency: int) -> list[str]:
        """
        The command of a worker that runs until SIGTERM, with so many requests at once.
        """

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        The command that measures what enqueueing costs a business transaction.

        So many clients at once run, in alternating slices, the transaction of `business.sql`
        without and with an enqueue of one event. It prints one JSON document,
        {"without": transactions per second, "with": …, "milliseconds_without": median of one,
        "milliseconds_with": …}.
        """

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        The command that commits business transactions with one event each at a steady pace.

        It prints one JSON document, [[nanoseconds, key], …]: CLOCK_MONOTONIC when COMMIT had
        returned. Wakes the worker as this system does at its best.
        """

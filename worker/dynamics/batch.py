"""
Values that are to be written at about the same time, in one request.

A `Batcher` stands where a `DynamicsClient` stands: whoever delivers an event calls it as if it
were alone, with a deadline, an answer and an error of its own. It asks for less than `size`
when Dynamics does not manage so many within the deadline, or refuses a batch as too large.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from outbox.errors import DeliveryError
from worker.dynamics.client import BatchRefusedError, Change
from worker.dynamics.errors import TIMEOUT
from worker.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from worker.dynamics.client import DynamicsClient

log = structlog.get_logger(__name__)

GATHER_SECONDS = 0.005
"""How long the first value waits for others: far less than a request takes."""

MAX_OPERATIONS = 1000
"""Source: Microsoft Learn, "Execute batch operations using the Web API"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    change: Change
    ends_at: float


class Batcher:
    """
    Writes values in batches of up to `size`.

    Args:
        client: it is not closed.
        size: 1 to `MAX_OPERATIONS`.
    """

    def __init__(self, client: DynamicsClient, *, size: int) -> None:
        self._client = client
        self._size = size
        self._gathering: Gathering[_Call, None] = Gathering(
            self._write, most=size, seconds=GATHER_SECONDS
        )

    @property
    def takes_mentor_id(self) -> bool:
        """
        As the client's.
        """
        return self._client.takes_mentor_id

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Write one value, together with others; as the client's.
        """
        change = Change(row=row, visible=visible, correlation_id=correlation_id)
        ends_at = asyncio.get_running_loop().time() + seconds
        await self._gathering(_Call(change=change, ends_at=ends_at))

    async def aclose(self) -> None:
        """
        Give up whatever is under way.
        """
        await self._gathering.aclose()

    async def _write(self, calls: Sequence[_Call]) -> Sequence[Exception | None]:
        seconds = min(call.ends_at for call in calls) - asyncio.get_running_loop().time()
        if len(calls) == 1:
            return [await self._write_one(calls[0].change, seconds)]
        try:
            outcomes = await self._client.set_visibilities(
                [call.change for call in calls], seconds=seconds
            )
        except BatchRefusedError as error:
            self._ask_for_less(len(calls), reason=error.code)
            half = len(calls) // 2
            return [*await self._write(calls[:half]), *await self._write(calls[half:])]
        except DeliveryError as error:
            return [error] * len(calls)  # theirs alone: another half may have been written
        if any(isinstance(one, DeliveryError) and one.code == TIMEOUT.code for one in outcomes):
            self._ask_for_less(len(calls), reason=TIMEOUT.code)
        elif len(calls) == self._gathering.most:
            self._gathering.most = min(self._size, 2 * self._gathering.most)
        return outcomes

    async def _write_one(self, change: Change, seconds: float) -> DeliveryError | None:
        try:
            await self._client.set_visibility(
                change.row,
                visible=change.visible,
                seconds=seconds,
                correlation_id=change.correlation_id,
            )
        except DeliveryError as error:
            return error
        return None

    def _ask_for_less(self, number: int, *, reason: str) -> None:
        self._gathering.most = max(1, min(self._gathering.most, number // 2))
        log.info("batch.smaller", operations=self._gathering.most, reason=reason)

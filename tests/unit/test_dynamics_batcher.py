"""
Values that share a request, and the answers that each of them gets.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from typing_extensions import override

from outbox.errors import DeliveryError, TransientError
from worker.dynamics.batch import Batcher
from worker.dynamics.client import BatchRefusedError, Change, DynamicsClient, DynamicsTarget
from worker.dynamics.exchange import Exchange
from worker.http_client import HttpClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yarl import URL


class Nobody:
    """
    Proves nothing.
    """

    async def authorization(self, _url: URL) -> str:
        """
        Never asked.
        """
        raise NotImplementedError

    async def another(self, _url: URL, _refused: str) -> str | None:
        """
        Never asked.
        """
        raise NotImplementedError


class Picky(DynamicsClient):
    """
    Takes no batch of more than two, and has no token for the third one that is asked for.
    """

    def __init__(self) -> None:
        super().__init__(
            DynamicsTarget(url="https://hlf.example"), Exchange(HttpClient(), Nobody())
        )
        self.asked = 0
        self.written: list[UUID | str] = []

    @override
    async def set_visibilities(
        self, changes: Sequence[Change], *, seconds: float
    ) -> list[DeliveryError | None]:
        """
        As the real one.
        """
        self.asked += 1
        if len(changes) > 2:
            raise BatchRefusedError("too_large")
        if self.asked == 3:
            raise TransientError("token_unavailable", "No token.")
        self.written += [change.row for change in changes]
        return [None] * len(changes)


async def test_what_befalls_one_half_of_a_refused_batch_is_not_said_of_the_other() -> None:
    """
    The first half is written, and must not be taken for something that was never sent.
    """
    client, rows = Picky(), [uuid4() for _ in range(4)]
    async with aclosing(Batcher(client, size=4)) as batcher:
        outcomes = await asyncio.gather(
            *(
                batcher.set_visibility(row, visible=True, seconds=5, correlation_id=uuid4())
                for row in rows
            ),
            return_exceptions=True,
        )

    assert client.written == rows[:2]
    assert outcomes[:2] == [None, None]
    assert [type(outcome) for outcome in outcomes[2:]] == [TransientError, TransientError]

"""
One request and its answer, within a deadline; whatever is asked and whoever answers.

    answer ── deadline ── a place ─┬─ proof of who we are, another one if it is refused
                                   ├─ try, at most 3 times while no connection can be made
                                   └─ none? ── an error that says whether it is doubtful
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from worker.dynamics.errors import CERTIFICATE, DYNAMICS_IS_SILENT, INVALID_ADDRESS
from worker.http_client import NoAnswerError, Trail

if TYPE_CHECKING:
    from yarl import URL

    from outbox.errors import DeliveryError
    from worker.dynamics.errors import Silence
    from worker.http_client import Answer, HttpClient, Outgoing

CONNECTIONS = 8
"""Requests under way at once, if the caller says nothing else."""

WAITS = (0.1, 0.2)
"""Seconds between the three tries of one attempt, as long as no connection could be made."""


class Proof(Protocol):
    """
    What proves who we are, to one place and to no other.
    """

    async def authorization(self, url: URL) -> str:
        """
        The value of the header.

        Raises:
            DeliveryError: it is not for this address, or cannot be had; nothing was sent.
        """

    async def another(self, url: URL, refused: str) -> str | None:
        """
        The value to try instead of one that was refused; None if there is no other.

        Raises:
            DeliveryError: as above.
        """


class Exchange:
    """
    Requests to one server.

    Args:
        http: closed with this object.
        proof: it is not closed.
        places: so many requests may be under way at once.
        silence: what it is called that no answer came.
    """

    def __init__(
        self,
        http: HttpClient,
        proof: Proof,
        *,
        places: int = CONNECTIONS,
        silence: Silence = DYNAMICS_IS_SILENT,
    ) -> None:
        self._http = http
        self._proof = proof
        self._places = asyncio.Semaphore(places)
        self._silence = silence

    async def aclose(self) -> None:
        """
        Close the connections.
        """
        await self._http.aclose()

    async def answer(self, outgoing: Outgoing, seconds: float) -> Answer | DeliveryError:
        """
        The answer, or what went wrong instead.

        A value, so that nothing that an exception may hold hangs on the error that is raised.

        Raises:
            DeliveryError: nothing proves who we are, so nothing was sent.
        """
        trail = Trail()
        try:
            async with asyncio.timeout(seconds), self._places:
                return await self._proven(outgoing, trail)
        except NoAnswerError as silence:
            return error_from_silence(silence, sent=trail.sent, silence=self._silence)
        except TimeoutError as error:
            return self._silence.timeout.error(type(error).__name__, doubtful=trail.sent)

    async def _proven(self, outgoing: Outgoing, trail: Trail) -> Answer:
        """
        The answer to a request that proves who we are; a second refusal is the answer.
        """
        value = await self._proof.authorization(outgoing.url)
        answer = await self._try(_authorized(outgoing, value), trail)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            another = await self._proof.another(outgoing.url, value)
            if another is not None:
                return await self._try(_authorized(outgoing, another), trail)
        return answer

    async def _try(self, outgoing: Outgoing, trail: Trail) -> Answer:
        """
        Ask once, and again as long as it certainly did not reach the server.
        """
        for seconds in WAITS:
            try:
                return await self._http.send(outgoing, trail)
            except NoAnswerError as silence:
                if silence.reason != "unreachable":
                    raise
            await asyncio.sleep(seconds)
        return await self._http.send(outgoing, trail)


def _authorized(outgoing: Outgoing, value: str) -> Outgoing:
    return replace(outgoing, headers={**outgoing.headers, "Authorization": value})


def error_from_silence(
    error: NoAnswerError, *, sent: bool, silence: Silence = DYNAMICS_IS_SILENT
) -> DeliveryError:
    """
    What it means that no answer came.

    Args:
        sent: some of the request may have reached the server, so it may yet take effect.
    """
    meaning = {
        "address": INVALID_ADDRESS,
        "certificate": CERTIFICATE,
        "unreachable": silence.unreachable,
        "lost": silence.lost,
        "incomplete": silence.incomplete,
    }[error.reason]
    return meaning.error(error.name, doubtful=sent)

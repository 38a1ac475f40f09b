"""
One request on its way through the sandbox, and how each fault treats it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, assert_never

from worker.dynamics.sandbox import dataverse, entra
from worker.dynamics.sandbox.faults import (
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    Late,
    Oversized,
    Redirect,
    ResetAfter,
    ResetBefore,
    Slow,
    Status,
    Truncated,
)
from worker.dynamics.sandbox.messages import Response

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.dynamics.sandbox.connection import Exchange
    from worker.dynamics.sandbox.ledger import Entry, Ledger

GARBAGE = b"\x16\x03\x01\x00\xff this is no HTTP \x00\r\n\r\n"
PAGE = b"<!doctype html><title>Sign in</title><p>Please sign in to the network first.</p>\n"

# Error codes that usually come with a status, when a fault names none.
# Source: Microsoft Learn, "Web service error codes" and "Service protection API limits".
USUAL_CODES = {
    401: "0x8005F101",
    403: "0x80040220",
    404: "0x80040217",
    412: "0x80060882",
    429: "0x80072322",
    500: "0x80040216",
}


class Visit:
    """
    One request, what it would ordinarily get, and its entry in the ledger.

    Args:
        exchange: the way back to the client.
        entry: has begun.
        ledger: where it is finished.
        work: makes the change, notes it in the entry and gives the answer; called at most
            once.
        expire: revokes the token that came with the request.
    """

    def __init__(
        self,
        exchange: Exchange,
        entry: Entry,
        *,
        ledger: Ledger,
        work: Callable[[], Response],
        expire: Callable[[], None],
    ) -> None:
        self.exchange = exchange
        self.entry = entry
        self.parts: list[Entry] = []
        self.work = work
        self.expire = expire
        self._ledger = ledger

    async def send(self, response: Response) -> None:
        """
        Write the entry, then answer.
        """
        self.over(response)
        await self.exchange.send(response)

    def over(self, response: Response | None = None) -> None:
        """
        Write the entry.

        Args:
            response: what the client gets; None if nothing.
        """
        if response and self.exchange.gone_at is None:
            self.entry.status, self.entry.code = response.status, response.code
        self._ledger.finish(self.entry, at=self.exchange.gone_at, parts=self.parts)


async def act(fault: Fault, visit: Visit) -> None:
    """
    Treat a request as a fault says.
    """
    visit.entry.fault = fault.what
    match fault:
        case Slow() | Drip() | Late() | Hang():
            await _take_time(fault, visit)
        case ResetBefore() | ResetAfter() | Garbage() | Truncated():
            await visit.exchange.pause(fault.seconds)
            await _break_off(fault, visit)
        case Status() | Html() | Oversized() | Redirect() | ExpireToken():
            await visit.exchange.pause(fault.seconds)
            await visit.send(_answer(fault, visit))
        case _:
            assert_never(fault)


async def _take_time(fault: Slow | Drip | Late | Hang, visit: Visit) -> None:
    match fault:
        case Slow():
            await _be_slow(fault, visit)
        case Drip():
            response = visit.work()
            await visit.exchange.drip(response, seconds=fault.seconds)
            visit.over(response)
        case Late():
            await _land_late(fault, visit)
        case Hang():
            if fault.applied:
                visit.work()
            await visit.exchange.hold()
            visit.over()


async def _be_slow(fault: Slow, visit: Visit) -> None:
    response = visit.work() if fault.applied else None
    still_there = await visit.exchange.pause(fault.seconds)
    if response is None and still_there:
        response = visit.work()
    if response is None:
        visit.over()
    else:
        await visit.send(response)


async def _land_late(fault: Late, visit: Visit) -> None:
    await visit.exchange.outlast(fault.seconds)
    visit.work()
    visit.over()


async def _break_off(fault: ResetBefore | ResetAfter | Garbage | Truncated, visit: Visit) -> None:
    response = visit.work() if fault.applied else None
    match fault:
        case ResetBefore() | ResetAfter():
            visit.over()
            visit.exchange.reset()
        case Garbage():
            visit.over()
            await visit.exchange.garble(GARBAGE)
        case Truncated():
            body = _with_body(response)
            visit.over(body)
            await visit.exchange.truncate(body)


def _answer(fault: Status | Html | Oversized | Redirect | ExpireToken, visit: Visit) -> Response:
    if fault.applied:
        visit.work()
    match fault:
        case Status():
            return status_answer(fault, kind=visit.entry.kind)
        case Html():
            return Response(status=fault.status, headers=_html(), body=PAGE)
        case Oversized():
            body = json.dumps({"value": "x" * (fault.megabytes * 1_000_000 - 13)}).encode()
            return Response(status=fault.status, headers=_json(), body=body)
        case Redirect():
            return Response(status=fault.status, headers=(("Location", fault.location),))
        case ExpireToken():
            visit.expire()
            return visit.work()


def status_answer(fault: Status, *, kind: str) -> Response:
    """
    The error answer of a `Status` fault, in the shape of whom it seems to come from.
    """
    extra = (("Retry-After", fault.retry_after),) if fault.retry_after is not None else ()
    if kind in {"token", "discovery"}:
        usual = "invalid_client" if fault.status == 401 else "temporarily_unavailable"  # noqa: PLR2004
        return entra.refused(fault.status, fault.code or usual, 90033, fault.message, headers=extra)
    code = USUAL_CODES.get(fault.status, "") if fault.code is None else fault.code
    return dataverse.error(fault.status, code, fault.message, headers=extra)


def _with_body(response: Response | None) -> Response:
    """
    The answer itself, or one that has a body to be cut short.
    """
    if response and response.body:
        return response
    return Response(status=200, headers=_json(), body=b'{"@odata.context":')


def _json() -> tuple[tuple[str, str], ...]:
    return (("Content-Type", "application/json; odata.metadata=minimal"),)


def _html() -> tuple[tuple[str, str], ...]:
    return (("Content-Type", "text/html; charset=utf-8"),)

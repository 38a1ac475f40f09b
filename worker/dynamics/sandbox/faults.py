"""
What can be made to go wrong, and where.

An order says *what* (the class), *where* (`target`, `key`, `method`) and *how often*
(`times`). The first order that fits a request is acted out and counted down.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from worker.dynamics.sandbox.refusal import SandboxError, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from worker.dynamics.sandbox.ledger import Entry

Delay = Annotated[float, Field(ge=0, le=3600)]
Interval = Annotated[float, Field(gt=0, le=3600)]

TARGETS: dict[str, frozenset[str]] = {
    "token": frozenset({"token", "discovery"}),
    "data": frozenset({"data", "read", "batch"}),
    "any": frozenset({"token", "discovery", "data", "read", "batch", "other"}),
}


class Order(BaseModel):
    """
    What all faults have in common.

    Args:
        target: requests for a token, for data, or both.
        key: only for this row: its GUID, its key as addressed, or the key's value.
        method: only for this HTTP method.
        times: for so many requests; None until it is removed.
        seconds: wait so long first, unless the fault says otherwise.
        applied: the change takes effect (and a token is issued) although the answer does
            not say so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Literal["any", "token", "data"] = "any"
    key: str | None = None
    method: str | None = None
    times: Annotated[int, Field(gt=0)] | None = 1
    seconds: Delay = 0.0
    applied: bool = False

    def fits(self, entry: Entry) -> bool:
        """
        Whether a request is meant.
        """
        wanted = (self.key or "").lower()
        return (
            entry.kind in TARGETS[self.target]
            and (self.method is None or self.method.upper() == entry.method)
            and (not wanted or wanted in _names(entry))
        )


class Status(Order):
    """
    An error answer.

    Args:
        status: HTTP status.
        code: error code in the body; None for the usual one of that status.
        message: text in the body.
        retry_after: the header, sent literally ("7", a date, "-1", "soon"); None: no header.
    """

    what: Literal["status"] = "status"
    status: Annotated[int, Field(ge=400, le=599)]
    code: str | None = None
    message: str = "Ordered from the sandbox."
    retry_after: Annotated[str, Field(pattern=r"^[ -~]*$")] | None = None


class Slow(Order):
    """
    The right answer, `seconds` late. The change takes effect before the wait, or, with
    `applied` false, after it, and then only if the client is still there.
    """

    what: Literal["slow"] = "slow"
    seconds: Interval
    applied: bool = True


class Drip(Order):
    """
    The right answer, one byte every `seconds`.
    """

    what: Literal["drip"] = "drip"
    seconds: Interval
    applied: Literal[True] = True


class ResetBefore(Order):
    """
    A connection reset; nothing has happened.
    """

    what: Literal["reset_before"] = "reset_before"
    applied: Literal[False] = False


class ResetAfter(Order):
    """
    The change takes effect, then a connection reset: the answer is lost.
    """

    what: Literal["reset_after"] = "reset_after"
    applied: Literal[True] = True


class Late(Order):
    """
    No answer; after `seconds` the change takes effect, also if the client has long gone,
    and the connection is closed: an old request that lands late.
    """

    what: Literal["late"] = "late"
    seconds: Interval
    applied: Literal[True] = True


class Hang(Order):
    """
    No answer, ever.
    """

    what: Literal["hang"] = "hang"


class Garbage(Order):
    """
    Bytes that are no HTTP, then the end of the connection.
    """

    what: Literal["garbage"] = "garbage"


class Html(Order):
    """
    A web page, as gateways and captive portals answer.
    """

    what: Literal["html"] = "html"
    status: Annotated[int, Field(ge=200, le=599)] = 200


class Truncated(Order):
    """
    An answer that ends before its Content-Length; the change takes effect.
    """

    what: Literal["truncated"] = "truncated"
    applied: Literal[True] = True


class Oversized(Order):
    """
    An answer with a body of `megabytes` (10**6 bytes each).
    """

    what: Literal["oversized"] = "oversized"
    status: Annotated[int, Field(ge=200, le=599)] = 200
    megabytes: Annotated[int, Field(gt=0, le=100)] = 10


class Redirect(Order):
    """
    "Ask there instead": a client must not carry its token to another host.
    """

    what: Literal["redirect"] = "redirect"
    status: Literal[301, 302, 303, 307, 308] = 302
    location: Annotated[str, Field(min_length=1, pattern=r"^[!-~]+$")]


class ExpireToken(Order):
    """
    The token that comes with the request is revoked, so the answer is 401.
    """

    what: Literal["expire_token"] = "expire_token"
    target: Literal["data"] = "data"
    applied: Literal[False] = False


Fault = (
    Status
    | Slow
    | Drip
    | ResetBefore
    | ResetAfter
    | Late
    | Hang
    | Garbage
    | Html
    | Truncated
    | Oversized
    | Redirect
    | ExpireToken
)

_READER: TypeAdapter[Fault] = TypeAdapter(Annotated[Fault, Field(discriminator="what")])


def read_fault(fields: Mapping[str, Any]) -> Fault:
    """
    A fault from plain values; `what` names its class.

    Raises:
        SandboxError: no such fault, or an impossible value.
    """
    try:
        return _READER.validate_python(fields)
    except ValidationError as error:
        raise SandboxError(sentence("Wrong fault", error)) from error


@dataclass(slots=True, kw_only=True)
class Standing:
    """
    An order that has not been used up.

    Args:
        id: 1 for the first.
        left: requests it will still hit; None without end.
        used: requests it has hit.
    """

    id: int
    fault: Fault
    left: int | None
    used: int = 0

    def to_json(self) -> dict[str, Any]:
        """
        The fault's fields, and `id`, `left` and `used`.
        """
        return {"id": self.id, "left": self.left, "used": self.used} | self.fault.model_dump()


class Faults:
    """
    The standing orders, oldest first.
    """

    def __init__(self) -> None:
        self._ids = count(1)
        self._standing: list[Standing] = []

    @property
    def standing(self) -> Sequence[Standing]:
        """
        What is still ordered.
        """
        return tuple(self._standing)

    def add(self, fault: Fault) -> int:
        """
        Order a fault.

        Returns:
            Its id.
        """
        order = Standing(id=next(self._ids), fault=fault, left=fault.times)
        self._standing.append(order)
        return order.id

    def remove(self, fault_id: int | None = None) -> int:
        """
        Call one off, or all.

        Returns:
            How many there were.
        """
        kept = [each for each in self._standing if fault_id not in {None, each.id}]
        removed = len(self._standing) - len(kept)
        self._standing = kept
        return removed

    def take(
        self, entry: Entry, *, allowed: Callable[[Fault], bool] = lambda _: True
    ) -> Fault | None:
        """
        The fault that this request meets, counted down; None if it meets none.
        """
        for order in self._standing:
            if order.fault.fits(entry) and allowed(order.fault):
                self._count_down(order)
                return order.fault
        return None

    def _count_down(self, order: Standing) -> None:
        order.used += 1
        if order.left is not None:
            order.left -= 1
            if order.left == 0:
                self._standing.remove(order)


def _names(entry: Entry) -> set[str]:
    key = (entry.key or "").lower()
    return {key, key.partition("=")[2], entry.row or ""} - {""}

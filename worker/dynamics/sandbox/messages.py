"""
What a client sends and what it is sent back, free of sockets.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BODY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """
    One request, read to its end.

    Args:
        method: as sent, upper case.
        target: path and query, as sent (still percent-encoded).
        headers: names in lower case; repeated ones joined by a comma.
        body: at most `MAX_BODY_BYTES`; empty if it was longer.
        oversized: the body was longer than that, and was thrown away.
        scheme: "http" or "https".
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    oversized: bool = False
    scheme: str = "http"

    @property
    def path(self) -> str:
        """
        The target without its query.
        """
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """
        The parameters of the query, decoded; of repeated ones the last.
        """
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2]))

    @property
    def base_url(self) -> str:
        """
        Scheme and host as the client knows them, lower case, without a slash at the end.
        """
        return f"{self.scheme}://{self.headers.get('host', '')}".lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """
    One answer; Content-Length and Date are added when it is sent.

    Args:
        code: the error code that the body carries, for the ledger.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    code: str | None = None

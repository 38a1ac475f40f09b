"""
The outermost layer: what no page has to think of.

    which host is meant?        none but ours, or a name somebody else owns could point at us
    who sent the form?          no other site's page
    how large is it?            no larger than a note
    what may a page load?       what comes from here, and nothing inline

Every answer goes out with the same headers, also those to requests that fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse

from worker.coordinator import problems
from worker.coordinator.problems import API

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

MOST_BYTES = 64 * 1024
"""A request with more in it is refused; a note of a person has a few hundred."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; object-src 'none';"
    " frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=()",
    "X-Robots-Tag": "noindex, nofollow",
    "Cache-Control": "no-store",
}
"""On every answer that does not say otherwise."""

HTTPS_ONLY = "max-age=31536000"
"""For a year, browsers come by https; said where the public address is https."""

HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """
    ASGI middleware around everything.

    Args:
        hosts: names by which we may be called, without port.
        https: the public address is https.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], https: bool) -> None:
        self._app = RequestBodyLimitMiddleware(app, max_body_size=MOST_BYTES)
        self._hosts = frozenset(hosts)
        self._headers = HEADERS | ({"Strict-Transport-Security": HTTPS_ONLY} if https else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Let a request through, or answer it.
        """
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket; unanswered, it is refused
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self._refusal(scope) or self._app
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        if hostname(headers.get("host", "")) not in self._hosts:
            return _refused(scope, 421, "misdirected", "This is not the address of this page.")
        if scope["method"] not in HARMLESS and not is_our_own(headers):
            log.warning("request.refused", reason="cross_origin", path=scope["path"])
            return _refused(
                scope, 403, "cross-origin", "This came from another site, or does not say whence."
            )
        return None


def _refused(scope: Scope, status: int, kind: str, sentence: str) -> ASGIApp:
    if scope["path"].startswith(API):
        return problems.answer(status, kind, sentence)
    return PlainTextResponse(sentence, status_code=status)


def hostname(host: str) -> str:
    """
    The name in a Host header, in lower case, without its port.
    """
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def is_our_own(headers: Headers) -> bool:
    """
    Whether a request that changes something can be meant by whoever is logged in.

    Browsers say where it comes from. What says nothing is no browser of this decade; it is
    believed if no page of another site could have made it: with a token, or as JSON.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return "authorization" in headers or kind == "application/json"

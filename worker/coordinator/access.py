"""
Who may: a person who logged in, an app with a token, or, on this machine alone, whoever is there.

    browser ──► /login ──► the provider ──► /login/callback ──► a session of ours, in a cookie
    app ──► Authorization: Bearer … ──► checked against the provider's keys, each time

What is needed between /login and its callback (state, nonce, PKCE verifier) is derived from one
random seed that only the browser keeps, so nothing is stored for people who never come back.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote
from uuid import UUID

import structlog
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from starlette.responses import RedirectResponse
from starlette.routing import Route

from worker.coordinator.callers import Caller
from worker.coordinator.tokens import TokenRefusedError
from worker.errors import NotAllowedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from worker.coordinator.callers import Role
    from worker.coordinator.sessions import Sessions
    from worker.coordinator.tokens import Issuer

log = structlog.get_logger(__name__)

LOGIN_SECONDS = 600
"""To find one's password and one's telephone."""

LONGEST_NEXT = 500

SCOPE = "openid profile email"


class Access(Protocol):
    """
    How callers are told apart.
    """

    async def caller(self, request: HTTPConnection) -> Caller | None:
        """
        Whoever asks; None if that is not known.

        Raises:
            NotAllowedError: it is known, and they have no business here.
        """

    def routes(self) -> list[BaseRoute]:
        """
        Of logging in and out.
        """

    @property
    def logs_in(self) -> bool:
        """
        Whether there is a login to send people to.
        """


class Local:
    """
    Without a login: whoever can reach the loopback address is this machine's coordinator.
    """

    logs_in = False

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def caller(self, request: HTTPConnection) -> Caller | None:  # noqa: ARG002
        """
        The one there is.
        """
        return self._caller

    def routes(self) -> list[BaseRoute]:
        """
        None: nobody logs in or out.
        """
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """
    What the provider knows us as, and where its tokens say who somebody is.

    Args:
        secret: read anew at each login; "" for a client that has none.
        audience: of tokens that apps send.
        organization_claim, role_claim: a dot leads inwards.
    """

    id: str
    secret: Callable[[], str]
    audience: str
    organization_claim: str
    role_claim: str


class Login:
    """
    OpenID Connect, with the authorization code and PKCE.

    Args:
        url: our public address, without a slash at its end.
    """

    logs_in = True

    def __init__(self, issuer: Issuer, client: Client, sessions: Sessions, *, url: str) -> None:
        self._issuer = issuer
        self._client = client
        self._sessions = sessions
        self._url = url
        self._https = url.startswith("https://")
        # With this prefix a browser takes the cookie from this very host alone, by https.
        prefix = "__Host-" if self._https else ""
        self.session_cookie = f"{prefix}session"
        self.login_cookie = f"{prefix}login"

    async def caller(self, request: HTTPConnection) -> Caller | None:
        """
        By the token, if there is one; else by the session.
        """
        if header := request.headers.get("authorization"):
            return await self._bearer(header)
        if token := request.cookies.get(self.session_cookie):
            return await self._sessions.caller(token)
        return None

    async def _bearer(self, header: str) -> Caller | None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            claims = await self._issuer.claims(token.strip(), audience=self._client.audience)
        except TokenRefusedError as error:
            log.info("token.refused", reason=str(error))
            return None
        return caller_from(claims, self._client)

    def routes(self) -> list[BaseRoute]:
        """
        Of logging in and out.
        """
        return [
            Route("/login", self._begin),
            Route("/login/callback", self._end),
            Route("/logout", self._log_out, methods=["POST"]),
            Route("/logged-out", _logged_out),
        ]

    async def _begin(self, request: Request) -> Response:
        metadata = await self._issuer.metadata()
        seed = secrets.token_urlsafe(32)
        address = prepare_grant_uri(
            metadata.authorization_endpoint,
            client_id=self._client.id,
            response_type="code",
            redirect_uri=self._callback,
            scope=SCOPE,
            state=_derived(seed, "state"),
            nonce=_derived(seed, "nonce"),
            code_challenge=create_s256_code_challenge(_derived(seed, "verifier")),
            code_challenge_method="S256",
        )
        response = RedirectResponse(address, status_code=303)
        came_for = quote(_local(request.query_params.get("next", "")), safe="")
        self._set(response, self.login_cookie, f"{seed}.{came_for}", seconds=LOGIN_SECONDS)
        return response

    async def _end(self, request: Request) -> Response:
        seed, _, came_for = request.cookies.get(self.login_cookie, "").partition(".")
        state = request.query_params.get("state", "")
        code = request.query_params.get("code", "")
        if not seed or not hmac.compare_digest(
            state.encode("utf-8", "replace"), _derived(seed, "state").encode()
        ):
            return self._failed(request, "took_long", 400, reason="state")
        if not code:
            return self._failed(request, "failed", 400, reason="no_code")
        try:
            claims = await self._redeem(code, seed)
        except TokenRefusedError as error:
            return self._failed(request, "failed", 400, reason=str(error))
        try:
            caller = caller_from(claims, self._client)
        except NotAllowedError:
            return self._failed(request, "no_role", 403, reason="no_role")
        if old := request.cookies.get(self.session_cookie):
            await self._sessions.close(old)
        response = RedirectResponse(_local(unquote(came_for)), status_code=303)
        self._set(response, self.session_cookie, await self._sessions.open(caller))
        self._unset(response, self.login_cookie)
        log.info("session.opened", subject=caller.subject)
        return response

    async def _redeem(self, code: str, seed: str) -> dict[str, Any]:
        """
        The claims of the ID token that a code stands for.
        """
        metadata = await self._issuer.metadata()
        secret = self._client.secret()
        body = prepare_token_request(
            "authorization_code",
            code=code,
            redirect_uri=self._callback,
            code_verifier=_derived(seed, "verifier"),
        )
        authentication = ClientAuth(
            self._client.id, secret, metadata.authentication if secret else "none"
        )
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        address, headers, body = authentication.prepare(
            "POST", metadata.token_endpoint, headers, body
        )
        answer = await self._issuer.exchange(address, headers=headers, body=body)
        token = (answer or {}).get("id_token")
        if not isinstance(token, str):
            raise TokenRefusedError("the code was not accepted")
        claims = await self._issuer.claims(token, audience=self._client.id)
        nonce = claims.get("nonce")
        if not isinstance(nonce, str) or not hmac.compare_digest(
            nonce.encode("utf-8", "replace"), _derived(seed, "nonce").encode()
        ):
            raise TokenRefusedError("it is for another login")
        if claims.get("azp", self._client.id) != self._client.id:
            raise TokenRefusedError("it is for another client")
        return claims

    async def _log_out(self, request: Request) -> Response:
        if token := request.cookies.get(self.session_cookie):
            await self._sessions.close(token)
        response = RedirectResponse("/logged-out", status_code=303)
        self._unset(response, self.session_cookie)
        return response

    def _failed(self, request: Request, key: str, status: int, *, reason: str) -> Response:
        log.warning("session.refused", reason=reason)
        response: Response = request.app.state.login_page(request, key, status)
        self._unset(response, self.login_cookie)
        return response

    @property
    def _callback(self) -> str:
        return f"{self._url}/login/callback"

    def _set(
        self, response: Response, name: str, value: str, *, seconds: int | None = None
    ) -> None:
        response.set_cookie(
            name,
            value,
            max_age=seconds,
            path="/",
            secure=self._https,
            httponly=True,
            samesite="lax",
        )

    def _unset(self, response: Response, name: str) -> None:
        response.delete_cookie(name, path="/", secure=self._https, httponly=True, samesite="lax")


async def _logged_out(request: Request) -> Response:
    page: Response = request.app.state.login_page(request, "logged_out", 200)
    return page


def caller_from(claims: Mapping[str, Any], client: Client) -> Caller:
    """
    Whom a checked token speaks of.

    Raises:
        NotAllowedError: nobody with a role of ours in an organisation.
    """
    role = _role(_claim(claims, client.role_claim))
    organization_id = _uuid(_claim(claims, client.organization_claim))
    subject = _printable(claims["sub"])
    if role is None or organization_id is None or not subject:
        raise NotAllowedError(
            "You are logged in, but have no role here: ask IT to make you viewer or coordinator."
        )
    names = (claims.get(name) for name in ("name", "preferred_username", "email"))
    name = next((_printable(one) for one in names if isinstance(one, str) and one.strip()), subject)
    return Caller(subject=subject, name=name, organization_id=organization_id, role=role)


def _claim(claims: Mapping[str, Any], name: str) -> object:
    """
    A claim by its name; a dot leads inwards, unless the whole is a name.
    """
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _uuid(claimed: object) -> UUID | None:
    try:
        return UUID(claimed) if isinstance(claimed, str) else None
    except ValueError:
        return None


def _role(claimed: object) -> Role | None:
    roles = claimed if isinstance(claimed, list) else [claimed]
    if "coordinator" in roles:
        return "coordinator"
    return "viewer" if "viewer" in roles else None


def _printable(words: str) -> str:
    return "".join(letter for letter in words if letter.isprintable())[:200]


def _derived(seed: str, purpose: str) -> str:
    digest = hashlib.sha256(f"{purpose}:{seed}".encode("utf-8", "replace")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _local(path: str) -> str:
    """
    A path of ours, or the front page: nobody is sent elsewhere after logging in.
    """
    ours = (
        path.startswith("/")
        and not path.startswith(("//", "/\\", "/login", "/logged-out"))
        and path.isprintable()
        and len(path) <= LONGEST_NEXT
    )
    return path if ours else "/"

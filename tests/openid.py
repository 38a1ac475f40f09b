"""
An OpenID provider of our own, on loopback: it says what a test tells it to.

    GET   /.well-known/openid-configuration
    GET   /authorize       at once back to the client, with a code
    POST  /token           checks client, code, redirect address and PKCE
    GET   /keys
"""

from __future__ import annotations

import base64
import hashlib
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import httpx
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route

from tests.served import served
from worker.coordinator.access import Client, Login
from worker.coordinator.app import create_app
from worker.coordinator.sessions import Sessions
from worker.coordinator.tokens import Issuer
from worker.http_client import HttpClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from starlette.requests import Request
    from starlette.responses import Response

    from tests.factories import World

CLIENT_ID = "hlf-dashboard"
CLIENT_SECRET = "canary-4b7e-login-secret"  # noqa: S105 (of the provider above)


@cache
def usual_key() -> RSAKey:
    """
    One for all tests: making it takes long.
    """
    return new_key()


def new_key() -> RSAKey:
    """
    A key that nobody has seen.
    """
    key = RSAKey.generate_key(2048, {"use": "sig"}, private=True)
    key.ensure_kid()
    return key


@dataclass(slots=True, kw_only=True)
class Provider:
    """
    The provider, and what it is to say.

    Args:
        claims: of whoever logs in next.
        spoil: replaces claims of the next ID token.
        keys: what it publishes; the first one signs.
    """

    url: str = ""
    claims: dict[str, Any] = field(default_factory=dict)
    spoil: dict[str, Any] = field(default_factory=dict)
    keys: list[RSAKey | ECKey] = field(default_factory=lambda: [usual_key()])
    metadata: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: bool = True

    def who(self, subject: str, organization_id: UUID, role: str, **claims: object) -> None:
        """
        Whoever logs in from now on.
        """
        self.claims = person(subject, organization_id, role) | claims

    def token(
        self,
        *,
        key: RSAKey | ECKey | None = None,
        header: dict[str, Any] | None = None,
        **claims: object,
    ) -> str:
        """
        A token with these claims besides the usual; None takes one away.
        """
        now = int(time.time())
        said = {
            "iss": self.url,
            "aud": CLIENT_ID,
            "iat": now,
            "exp": now + 300,
            "jti": "canary-0e6d-token",
            **self.claims,
            **claims,
        }
        signing = key or self.keys[0]
        algorithm = "RS256" if isinstance(signing, RSAKey) else "ES256"
        return jwt.encode(
            {"alg": algorithm, "kid": signing.kid} | (header or {}),
            {name: value for name, value in said.items() if value is not None},
            signing,
        )

    def application(self) -> Starlette:
        """
        What answers.
        """
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._discovery),
                Route("/authorize", self._authorize),
                Route("/token", self._token, methods=["POST"]),
                Route("/keys", self._keys),
            ]
        )

    async def _discovery(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        if not self.answers:
            return JSONResponse({"error": "down"}, status_code=503)
        return JSONResponse(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/keys",
            }
            | self.metadata
        )

    async def _keys(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        return JSONResponse({"keys": [key.as_dict(private=False) for key in self.keys]})

    async def _authorize(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        asked = dict(request.query_params)
        code = f"code-{len(self.codes)}"
        self.codes[code] = asked
        back = urlencode({"code": code, "state": asked["state"]})
        return RedirectResponse(f"{asked['redirect_uri']}?{back}", status_code=302)

    async def _token(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        body = dict(parse_qsl((await request.body()).decode()))
        asked = self.codes.pop(body.get("code", ""), None)
        basic = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        if asked is None or request.headers.get("authorization") != f"Basic {basic}":
            return JSONResponse({"error": "invalid_grant"}, status_code=400)
        digest = hashlib.sha256(body["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        assert asked["code_challenge_method"] == "S256"
        if challenge != asked["code_challenge"] or body["redirect_uri"] != asked["redirect_uri"]:
            return JSONResponse({"error": "invalid_grant"}, status_code=400)
        spoilt = {"nonce": asked["nonce"]} | self.spoil
        return JSONResponse({"id_token": self.token(**spoilt), "token_type": "Bearer"})


def person(subject: str, organization_id: UUID, role: str) -> dict[str, Any]:
    """
    The claims of somebody with a role.
    """
    return {
        "sub": subject,
        "name": subject.title(),
        "app_metadata": {"organization_id": str(organization_id), "hlf_role": role},
    }


@asynccontextmanager
async def openid_provider() -> AsyncIterator[Provider]:
    """
    A provider on a port of its own.
    """
    provider = Provider()
    async with served(provider.application()) as provider.url:
        yield provider


@dataclass(slots=True, kw_only=True)
class Site:
    """
    A dashboard with a login, and its provider.
    """

    url: str
    provider: Provider
    world: World
    clock: list[float]

    @asynccontextmanager
    async def browser(self) -> AsyncIterator[httpx.AsyncClient]:
        """
        A browser without cookies yet, that follows where it is sent.
        """
        async with httpx.AsyncClient(base_url=self.url, follow_redirects=True) as browser:
            yield browser

    async def get(self, token: str, path: str) -> httpx.Response:
        """
        Ask as an app with a token does.
        """
        async with httpx.AsyncClient(base_url=self.url) as app:
            return await app.get(path, headers={"Authorization": f"Bearer {token}"})


@asynccontextmanager
async def site_with_login(world: World) -> AsyncIterator[Site]:
    """
    HLF's dashboard with a login; Ada, a coordinator, would log in.
    """
    clock = [1000.0]
    async with openid_provider() as provider, HttpClient() as http:
        provider.who("ada", world.hlf, "coordinator")
        login = Login(
            Issuer(provider.url, http=http, clock=lambda: clock[0]),
            Client(
                id=CLIENT_ID,
                secret=lambda: CLIENT_SECRET,
                audience=CLIENT_ID,
                organization_claim="app_metadata.organization_id",
                role_claim="app_metadata.hlf_role",
            ),
            Sessions(world.engine),
            url="",
        )
        app = create_app(world.engine, access=login, timezone="Europe/Oslo")
        async with served(app) as url:
            login._url = url
            yield Site(url=url, provider=provider, world=world, clock=clock)

"""
Tokens of an OpenID provider: whose they are, checked against the keys that it publishes.

    discovery     {issuer}/.well-known/openid-configuration, kept for an hour
    keys          its `jwks_uri`, kept for ten minutes, fetched anew for a key nobody knows
    a token       signed by one of them, for us, by this issuer, now

Sources: OpenID Connect Discovery 1.0, OpenID Connect Core 1.0 (3.1.3.7), RFC 7519, RFC 8725.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import structlog
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from yarl import URL

from worker.errors import UnreachableError
from worker.http_client import NoAnswerError, Outgoing
from worker.settings import is_safe_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from worker.http_client import Answer, HttpClient

log = structlog.get_logger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""Signatures only, of key pairs: whoever knows a public key cannot sign."""

REQUEST_SECONDS = 5.0
METADATA_SECONDS = 3600.0
KEYS_SECONDS = 600.0
"""How long a key that was withdrawn is believed."""

SELDOM_SECONDS = 10.0
"""Between two requests for keys at least, however many unknown ones are presented."""

LEEWAY_SECONDS = 30
"""That clocks may differ."""

LONGEST_TOKEN = 16 * 1024

LONGEST_DOCUMENT = 256 * 1024
"""Of the provider's; keys come with whole chains of certificates."""


class TokenRefusedError(Exception):
    """
    No token of this issuer for us, or not now; `str()` says why, for the log.
    """


class ProviderUnreachableError(UnreachableError):
    """
    The OpenID provider does not answer as one.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """
    Where the provider does what.

    Args:
        authentication: how a client with a secret says who it is at the token endpoint.
    """

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    authentication: str


class Issuer:
    """
    An OpenID provider.

    Args:
        url: the issuer, exactly as its tokens say.
        http: for it alone.
        clock: monotonic seconds.
    """

    def __init__(
        self, url: str, *, http: HttpClient, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = url
        self._http = http
        self._clock = clock
        self._fetching = asyncio.Lock()
        self._metadata: tuple[float, Metadata] | None = None
        self._keys: tuple[float, KeySet] | None = None

    async def metadata(self) -> Metadata:
        """
        What the provider says about itself.

        Raises:
            ProviderUnreachableError: it does not answer, or speaks for another issuer.
        """
        if self._metadata and self._clock() - self._metadata[0] < METADATA_SECONDS:
            return self._metadata[1]
        found = await self._document(
            f"{self.url.rstrip('/')}/.well-known/openid-configuration", "what it offers"
        )
        if found.get("issuer") != self.url:
            raise ProviderUnreachableError("The login speaks for another issuer than ours.")
        metadata = Metadata(
            authorization_endpoint=_address(found, "authorization_endpoint"),
            token_endpoint=_address(found, "token_endpoint"),
            jwks_uri=_address(found, "jwks_uri"),
            authentication=_authentication(found),
        )
        self._metadata = self._clock(), metadata
        return metadata

    async def claims(self, token: str, *, audience: str) -> dict[str, Any]:
        """
        What a token says, if it may be believed.

        Raises:
            TokenRefusedError: it may not.
            ProviderUnreachableError: nobody can tell, as the keys are not to be had.
        """
        if len(token) > LONGEST_TOKEN or token.count(".") != 2:  # noqa: PLR2004 (of a JWS)
            raise TokenRefusedError("it is no signed token")
        try:
            try:
                decoded = jwt.decode(token, await self._known_keys(), algorithms=ALGORITHMS)
            except InvalidKeyIdError:
                decoded = jwt.decode(
                    token, await self._known_keys(renew=True), algorithms=ALGORITHMS
                )
            if not isinstance(decoded.claims, dict):
                raise TokenRefusedError("it holds no claims")
            _rules(self.url, audience).validate(decoded.claims)
        except (JoseError, ValueError, TypeError, UnicodeError) as error:
            raise TokenRefusedError(f"{type(error).__name__}: {error}") from None
        return decoded.claims

    async def _known_keys(self, *, renew: bool = False) -> KeySet:
        async with self._fetching:
            if self._keys is not None:
                age = self._clock() - self._keys[0]
                if age < (SELDOM_SECONDS if renew else KEYS_SECONDS):
                    return self._keys[1]
            document = await self._document((await self.metadata()).jwks_uri, "its keys")
            self._keys = self._clock(), _key_pairs(document)
            return self._keys[1]

    async def exchange(
        self, url: str, *, headers: Mapping[str, str], body: str
    ) -> dict[str, Any] | None:
        """
        Ask the token endpoint; None if it refuses.

        Raises:
            ProviderUnreachableError: it does not answer.
        """
        answer = await self._send("POST", url, headers=headers, body=body.encode())
        return _json_object(answer.body) if answer.status == HTTPStatus.OK else None

    async def _document(self, url: str, what: str) -> dict[str, Any]:
        answer = await self._send("GET", url, headers={})
        document = _json_object(answer.body) if answer.status == HTTPStatus.OK else None
        if document is None:
            raise ProviderUnreachableError(f"The login does not say {what} (HTTP {answer.status}).")
        return document

    async def _send(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Answer:
        try:
            outgoing = Outgoing(
                method=method,
                url=URL(url),
                headers=headers,
                body=body,
                answer_bytes=LONGEST_DOCUMENT,
            )
            async with asyncio.timeout(REQUEST_SECONDS):
                return await self._http.send(outgoing)
        except (NoAnswerError, ValueError, TimeoutError) as error:
            log.warning("provider.unreachable", error=getattr(error, "name", type(error).__name__))
            raise ProviderUnreachableError("The login does not answer.") from None


def _rules(issuer: str, audience: str) -> jwt.JWTClaimsRegistry:
    return jwt.JWTClaimsRegistry(
        leeway=LEEWAY_SECONDS,
        iss={"essential": True, "value": issuer},
        aud={"essential": True, "value": audience},
        sub={"essential": True},
        exp={"essential": True},
    )


def _key_pairs(document: dict[str, Any]) -> KeySet:
    """
    The keys that sign; what is no public key of a pair is left out.
    """
    entries = document.get("keys")
    usable = [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and entry.get("kty") in {"RSA", "EC"}
        and entry.get("use", "sig") == "sig"
    ]
    try:
        return KeySet.import_key_set({"keys": usable})
    except (JoseError, ValueError, TypeError, KeyError):
        raise ProviderUnreachableError("The login publishes no keys that can be used.") from None


def _address(document: dict[str, Any], name: str) -> str:
    url = document.get(name)
    if not isinstance(url, str) or not is_safe_address(url):
        raise ProviderUnreachableError(f"The login has no usable {name}.")
    return url


def _authentication(document: dict[str, Any]) -> str:
    offered = document.get("token_endpoint_auth_methods_supported")
    if isinstance(offered, list) and "client_secret_basic" not in offered:
        return "client_secret_post"
    return "client_secret_basic"


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None

"""
Microsoft Entra ID, as far as an application with a secret meets it.

Source: Microsoft Learn, "Microsoft identity platform and the OAuth 2.0 client credentials
flow". The default lifetime of a token, 3,599 seconds, is what its example shows.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import urllib.parse
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from worker.dynamics.sandbox.messages import Request, Response
from worker.dynamics.sandbox.token_rules import TOKEN_RULES, TokenCall, TokenRule

if TYPE_CHECKING:
    from worker.dynamics.sandbox.registrations import Directory, Registration

TOKEN_PATH = re.compile(r"/(?P<tenant>[^/]+)/oauth2/v2\.0/token")
DISCOVERY_PATH = re.compile(r"/(?P<tenant>[^/]+)/v2\.0/\.well-known/openid-configuration")


def read_token_call(request: Request, directory: Directory) -> TokenCall:
    """
    Read a token request: credentials in the form, or by Basic authentication.

    Source: RFC 6749, section 2.3.1; in Basic, both halves are form-encoded.
    """
    match = TOKEN_PATH.fullmatch(request.path)
    tenant = urllib.parse.unquote(match["tenant"]) if match else ""
    form = dict(urllib.parse.parse_qsl(request.body.decode("utf-8", "replace")))
    basic_id, basic_secret = _basic(request.headers.get("authorization", ""))
    client_id = form.get("client_id") or basic_id
    return TokenCall(
        tenant=tenant,
        form=form,
        client_id=client_id,
        client_secret=form.get("client_secret") or basic_secret,
        registration=directory.find(tenant, client_id),
        tenant_is_known=directory.has_tenant(tenant),
        oversized=request.oversized,
        method=request.method,
    )


def _basic(header: str) -> tuple[str, str]:
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        name, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return urllib.parse.unquote_plus(name), urllib.parse.unquote_plus(secret)


def admit(call: TokenCall) -> Registration | Response:
    """
    Judge a token request.

    Returns:
        Who is to get the token, or the answer that refuses it.
    """
    for rule in TOKEN_RULES:
        if rule.broken(call):
            return _refusal(rule, call)
    return cast("Registration", call.registration)  # a rule has seen to it


def granted(text: str, *, seconds: int) -> Response:
    """
    The answer that carries a token.
    """
    fields = {
        "token_type": "Bearer",
        "expires_in": seconds,
        "ext_expires_in": seconds,
        "access_token": text,
    }
    return _answer(200, fields)


def refused(
    status: int,
    error: str,
    number: int,
    text: str,
    *,
    headers: tuple[tuple[str, str], ...] = (),
) -> Response:
    """
    An error in Entra's shape.

    Source: the protocol page, "Error response".
    """
    trace, correlation = str(uuid.uuid4()), str(uuid.uuid4())
    moment = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}"
    fields = {
        "error": error,
        "error_description": f"AADSTS{number}: {text} Trace ID: {trace}"
        f" Correlation ID: {correlation} Timestamp: {moment}",
        "error_codes": [number],
        "timestamp": moment,
        "trace_id": trace,
        "correlation_id": correlation,
    }
    return _answer(status, fields, headers=headers, code=error)


def _refusal(rule: TokenRule, call: TokenCall) -> Response:
    words = {
        "tenant": call.tenant,
        "client_id": call.client_id,
        "method": call.method,
        "scope": " ".join(call.scopes),
    }
    return refused(rule.status, rule.error, rule.number, rule.text.format(**words))


def discovery(request: Request, directory: Directory) -> Response:
    """
    The OpenID Connect metadata of a tenant, with the addresses the client itself used.

    Source: Microsoft Learn, "OpenID Connect on the Microsoft identity platform".
    """
    match = DISCOVERY_PATH.fullmatch(request.path)
    tenant = urllib.parse.unquote(match["tenant"]) if match else ""
    if not directory.has_tenant(tenant):
        text = f"Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID."
        return refused(400, "invalid_tenant", 90002, text)
    here = f"{request.base_url}/{tenant}"
    fields = {
        "token_endpoint": f"{here}/oauth2/v2.0/token",
        "token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic"],
        "jwks_uri": f"{here}/discovery/v2.0/keys",
        "response_types_supported": ["code", "id_token", "token"],
        "subject_types_supported": ["pairwise"],
        "id_token_signing_alg_values_supported": ["RS256"],
        "issuer": f"{here}/v2.0",
        "authorization_endpoint": f"{here}/oauth2/v2.0/authorize",
        "device_authorization_endpoint": f"{here}/oauth2/v2.0/devicecode",
        "end_session_endpoint": f"{here}/oauth2/v2.0/logout",
    }
    return _answer(200, fields)


def _answer(
    status: int,
    fields: dict[str, Any],
    *,
    headers: tuple[tuple[str, str], ...] = (),
    code: str | None = None,
) -> Response:
    return Response(
        status=status,
        headers=(
            ("Content-Type", "application/json; charset=utf-8"),
            ("Cache-Control", "no-store, no-cache"),
            ("x-ms-request-id", str(uuid.uuid4())),
            *headers,
        ),
        body=json.dumps(fields).encode(),
        code=code,
    )

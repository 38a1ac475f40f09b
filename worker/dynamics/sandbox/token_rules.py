"""
Why Entra ID would issue no token, as a table; the first broken rule is the answer.

Sources are pages of Microsoft Learn by their titles, and RFC 6749.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.dynamics.sandbox.registrations import Registration

PROTOCOL = 'Microsoft Learn: "OAuth 2.0 client credentials flow"'
CODES = 'Microsoft Learn: "Microsoft Entra authentication and authorization error codes"'

DEFAULT_SCOPE = "/.default"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCall:
    """
    A token request as the rules see it.
    """

    tenant: str
    form: dict[str, str]
    client_id: str
    client_secret: str
    registration: Registration | None
    tenant_is_known: bool
    oversized: bool
    method: str

    def lacks(self, parameter: str) -> bool:
        """
        Whether a parameter of the form is missing or empty.
        """
        return not self.form.get(parameter)

    @property
    def scopes(self) -> list[str]:
        """
        What is asked for; must be one.
        """
        return self.form.get("scope", "").split()

    @property
    def resource(self) -> str:
        """
        The URL that the token is to be good for.
        """
        return self.scopes[0].removesuffix(DEFAULT_SCOPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRule:
    """
    One reason to issue no token.

    Args:
        broken: whether the call breaks the rule.
        status: of the answer.
        error: OAuth's word for it.
        number: of the AADSTS code.
        text: may name fields of the call in braces.
        source: where the rule is from.
    """

    name: str
    broken: Callable[[TokenCall], bool]
    status: int
    error: str
    number: int
    text: str
    source: str


TOKEN_RULES: tuple[TokenRule, ...] = (
    TokenRule(
        name="the request is a POST",
        broken=lambda call: call.method != "POST",
        status=400,
        error="invalid_request",
        number=900561,
        text="The endpoint only accepts POST requests. Received a {method} request.",
        source=CODES,
    ),
    TokenRule(
        name="the body has a sane size",
        broken=lambda call: call.oversized,
        status=413,
        error="invalid_request",
        number=90013,
        text="Invalid input received from the user.",
        source="ours: the sandbox keeps no more than 1 MiB of a body",
    ),
    TokenRule(
        name="the tenant exists",
        broken=lambda call: not call.tenant_is_known,
        status=400,
        error="invalid_request",
        number=90002,
        text="Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID.",
        source=CODES,
    ),
    TokenRule(
        name="grant_type is given",
        broken=lambda call: call.lacks("grant_type"),
        status=400,
        error="invalid_request",
        number=900144,
        text="The request body must contain the following parameter: 'grant_type'.",
        source=CODES,
    ),
    TokenRule(
        name="grant_type is client_credentials",
        broken=lambda call: call.form["grant_type"] != "client_credentials",
        status=400,
        error="unsupported_grant_type",
        number=70003,
        text="The app requested an unsupported grant type.",
        source=CODES,
    ),
    TokenRule(
        name="client_id is given",
        broken=lambda call: not call.client_id,
        status=400,
        error="invalid_request",
        number=900144,
        text="The request body must contain the following parameter: 'client_id'.",
        source=CODES,
    ),
    TokenRule(
        name="the application is registered in this tenant",
        broken=lambda call: call.registration is None,
        status=400,
        error="unauthorized_client",
        number=700016,
        text="Application with identifier '{client_id}' was not found in the directory '{tenant}'.",
        source=CODES,
    ),
    TokenRule(
        name="a secret is given",
        broken=lambda call: not call.client_secret,
        status=401,
        error="invalid_client",
        number=7000216,
        text="'client_assertion', 'client_secret' or 'request' is required for the"
        " 'client_credentials' grant type.",
        source=f"{CODES}; the status is RFC 6749, section 5.2",
    ),
    TokenRule(
        name="the secret is right",
        broken=lambda call: not _secret_fits(call),
        status=401,
        error="invalid_client",
        number=7000215,
        text="Invalid client secret provided. Ensure the secret being sent in the request is the"
        " client secret value, not the client secret ID, for a secret added to app"
        " '{client_id}'.",
        source=f"{CODES}; the status is RFC 6749, section 5.2",
    ),
    TokenRule(
        name="scope is given",
        broken=lambda call: not call.scopes,
        status=400,
        error="invalid_request",
        number=900144,
        text="The request body must contain the following parameter: 'scope'.",
        source=CODES,
    ),
    TokenRule(
        name="scope is one resource",
        broken=lambda call: len(call.scopes) > 1,
        status=400,
        error="invalid_scope",
        number=70011,
        text="The provided value for the input parameter 'scope' is not valid. Scopes of one"
        " resource only can be requested.",
        source=PROTOCOL,
    ),
    TokenRule(
        name="scope is {resource}/.default",
        broken=lambda call: not _is_default_scope(call.scopes[0]),
        status=400,
        error="invalid_scope",
        number=1002012,
        text="The provided value for scope {scope} is not valid. Client credential flows must"
        " have a scope value with /.default suffixed to the resource identifier.",
        source=PROTOCOL,
    ),
)


def _secret_fits(call: TokenCall) -> bool:
    right = call.registration.client_secret if call.registration else ""
    return secrets.compare_digest(call.client_secret.encode(), right.encode())


def _is_default_scope(scope: str) -> bool:
    return scope.endswith(DEFAULT_SCOPE) and len(scope) > len(DEFAULT_SCOPE)

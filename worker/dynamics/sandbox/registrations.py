"""
Who may ask for a token, and the tokens that were given out.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from worker.dynamics.sandbox.ledger import fingerprint


class Registration(BaseModel):
    """
    An app registration, and where its application user lives.

    Args:
        tenant: id or domain of the directory.
        client_id: its application id.
        client_secret: its secret.
        hosts: host names (without port) of the Dataverse environments that know it as an
            application user; empty for every one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str = Field(min_length=1, pattern=r"^[^/\s]+$")
    client_id: str = Field(min_length=1)
    client_secret: str = Field(min_length=1, repr=False)
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """
    What is known of an issued access token.

    Args:
        client_id: whose it is.
        hosts: see `Registration`.
        resource: the only URL it is good for, lower case, no slash at the end.
        expires_at: monotonic seconds.
        fingerprint: stands for it in the ledger.
    """

    client_id: str
    hosts: tuple[str, ...]
    resource: str
    expires_at: float
    fingerprint: str


class Directory:
    """
    Registrations and the tokens that were issued to them.
    """

    def __init__(self) -> None:
        self._registrations: dict[tuple[str, str], Registration] = {}
        self._tokens: dict[str, Token] = {}

    def register(self, registration: Registration) -> None:
        """
        Add a registration, or replace the one of that tenant and client id.
        """
        key = (registration.tenant.lower(), registration.client_id.lower())
        self._registrations[key] = registration

    def has_tenant(self, tenant: str) -> bool:
        """
        Whether any application is registered there.
        """
        return any(known == tenant.lower() for known, _ in self._registrations)

    def find(self, tenant: str, client_id: str) -> Registration | None:
        """
        The registration of that client in that tenant.
        """
        return self._registrations.get((tenant.lower(), client_id.lower()))

    def issue(self, to: Registration, *, resource: str, expires_at: float) -> str:
        """
        The text of a new token; it is kept nowhere.
        """
        text = secrets.token_urlsafe(48)
        token = Token(
            client_id=to.client_id,
            hosts=to.hosts,
            resource=resource.lower().rstrip("/"),
            expires_at=expires_at,
            fingerprint=fingerprint(text),
        )
        self._tokens[token.fingerprint] = token
        return text

    def identify(self, bearer: str) -> Token | None:
        """
        The token of that text, also if it has expired; None if unknown or revoked.
        """
        return self._tokens.get(fingerprint(bearer))

    def forget(self, token_fingerprint: str | None) -> None:
        """
        Revoke one token, if there is such a one.
        """
        self._tokens.pop(token_fingerprint or "", None)

    def revoke(self) -> int:
        """
        Forget every token.

        Returns:
            How many there were.
        """
        revoked = len(self._tokens)
        self._tokens.clear()
        return revoked

"""
The only reader of secrets. It hands out capabilities, never strings.

Each secret comes from its variable, or from the file named by the same variable with
`_FILE`. The client secret is read anew for each token request, so that a rotated file is
picked up without a restart. Only the composition root may import this module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outbox.errors import ConfigurationError
from worker import database
from worker.dynamics.token import EntraAuth, isolated_http
from worker.errors import SettingsError

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.settings import DynamicsSettings

LISTEN = "LISTEN_DATABASE_URL"
CLIENT_SECRET = "HLF_DYNAMICS_CLIENT_SECRET"  # noqa: S105 (the name of a variable)
LOGIN_SECRET = "HLF_OIDC_CLIENT_SECRET"  # noqa: S105 (the name of a variable)


def database_engine(*, trust_seconds: float = 0) -> AsyncEngine:
    """
    An engine for `DATABASE_URL`; see `database.connect`.

    Raises:
        SettingsError: it is not set, or no PostgreSQL address.
    """
    return database.connect(
        _secret("DATABASE_URL"), application_name="hlf-sync", trust_seconds=trust_seconds
    )


async def listening_connection() -> psycopg.AsyncConnection[Any]:
    """
    A connection in autocommit mode to `LISTEN_DATABASE_URL`: the direct way, where
    `DATABASE_URL` goes through a transaction pooler; the same as that where it is not set.
    """
    variable = LISTEN if _optional_secret(LISTEN) else "DATABASE_URL"
    url = database.parse_url(_secret(variable), variable=variable)
    return await database.Connection.connect(
        **database.connection_arguments(url),
        autocommit=True,
        connect_timeout=5,
        application_name="hlf-sync listen",
    )


def migration_url() -> URL:
    """
    `DATABASE_URL` for Alembic; its password is masked in `str` and `repr`.
    """
    return database.parse_url(_secret("DATABASE_URL"))


def dynamics_auth(settings: DynamicsSettings) -> EntraAuth:
    """
    What adds this organisation's token to requests to its Dynamics, and to nothing else.

    Raises:
        SettingsError: the client secret is not there.
        ValueError: an address is not usable.
    """
    _secret(CLIENT_SECRET)
    return EntraAuth(
        authority=settings.authority,
        tenant_id=settings.tenant_id,
        client_id=settings.client_id,
        secret=_current_client_secret,
        resource=settings.url,
        http=isolated_http(),
    )


def login_secret() -> str:
    """
    What the dashboard proves itself with to the OpenID provider; "" for a client without one.

    Raises:
        SettingsError: it is in a file that cannot be read.
    """
    return _optional_secret(LOGIN_SECRET)


def _current_client_secret() -> str:
    try:
        return _secret(CLIENT_SECRET)
    except SettingsError as error:
        raise ConfigurationError("secret_missing", str(error)) from None


def _secret(name: str) -> str:
    value = _optional_secret(name)
    if not value:
        raise SettingsError(f"{name} is not set; set it, or {name}_FILE to a file that holds it.")
    return value


def _optional_secret(name: str) -> str:
    file = os.environ.get(f"{name}_FILE")
    if not file:
        return os.environ.get(name, "")
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError(f"{name}_FILE: cannot read {file}: {reason}.") from None

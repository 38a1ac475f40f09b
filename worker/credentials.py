"""
The only reader of secrets. It hands out capabilities, never strings.

Each secret comes from its variable, or from the file named by the same variable with
`_FILE`. The client secret is read anew for each token request, the reminders' secret for each
signature, and the Edge Function's key when it is refused, so that a rotated file is picked up
without a restart. Only the composition root may import this module.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from datetime import UTC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from standardwebhooks import Webhook

from outbox.errors import ConfigurationError
from worker import database
from worker.dynamics.edge import EdgeKey
from worker.dynamics.token import EntraAuth
from worker.errors import SettingsError
from worker.http_client import HttpClient
from worker.ping import Ping
from worker.settings import is_safe_address

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg
    from opentelemetry.sdk.trace.export import SpanExporter
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.reporting import Reports
    from worker.settings import DynamicsSettings, EdgeSettings
    from worker.webhook import Sign

log = structlog.get_logger(__name__)

PING = "HLF_NIGHTLY_PING_URL"
LISTEN = "LISTEN_DATABASE_URL"
CLIENT_SECRET = "HLF_DYNAMICS_CLIENT_SECRET"  # noqa: S105 (the name of a variable)
REMINDER_SECRET = "HLF_REMINDER_SECRET"  # noqa: S105 (the name of a variable)

SHORTEST_KEY, LONGEST_KEY = 24, 64
"""Bytes; the Standard Webhooks specification, "Signature scheme"."""

OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTLP_HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACES_HEADERS = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"

SENTRY = "SENTRY_DSN"

EDGE_KEY = "HLF_EDGE_KEY"
LOGIN_SECRET = "HLF_OIDC_CLIENT_SECRET"  # noqa: S105 (the name of a variable)


def database_engine(*, relaying: bool = False) -> AsyncEngine:
    """
    An engine for `DATABASE_URL`; see `database.connect`.

    Raises:
        SettingsError: it is not set, or no PostgreSQL address.
    """
    return database.connect(_secret("DATABASE_URL"), application_name="hlf-sync", relaying=relaying)


async def listening_connection() -> psycopg.AsyncConnection[Any]:
    """
    A connection in autocommit mode to `LISTEN_DATABASE_URL`: the direct way, where
    `DATABASE_URL` goes through a transaction pooler; the same as that where it is not set.
    """
    variable = LISTEN if _optional_secret(LISTEN) else "DATABASE_URL"
    return await _session(variable, "hlf-sync listen")


async def working_connection() -> psycopg.AsyncConnection[Any]:
    """
    A connection in autocommit mode to `DATABASE_URL`, beside those of the engine.
    """
    return await _session("DATABASE_URL", "hlf-sync")


async def _session(variable: str, application_name: str) -> psycopg.AsyncConnection[Any]:
    url = database.parse_url(_secret(variable), variable=variable)
    return await database.Connection.connect(
        **database.connection_arguments(url),
        autocommit=True,
        connect_timeout=5,
        application_name=application_name,
    )


def migration_url() -> URL:
    """
    `DATABASE_URL` for Alembic; its password is masked in `str` and `repr`.
    """
    return database.parse_url(_secret("DATABASE_URL"))


def nightly_ping() -> Ping:
    """
    Where the night run is heard; its address holds a token.

    Raises:
        SettingsError: the address is not usable.
    """
    try:
        return Ping(_optional_secret(PING))
    except ValueError as error:
        raise SettingsError(f"{PING}: {error}.") from None


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
        secret=partial(_current, CLIENT_SECRET),
        resource=settings.url,
        http=HttpClient(),
    )


def trace_exporter() -> SpanExporter | None:
    """
    What sends traces to the address of `OTEL_EXPORTER_OTLP_ENDPOINT`, whose headers may hold a
    secret; None if there is no address, or OpenTelemetry is not installed.

    The other variables of OpenTelemetry's are read by itself.

    Raises:
        SettingsError: the headers would travel in the clear.
        ValueError: one of those other variables is wrong.
    """
    endpoint = os.environ.get(TRACES_ENDPOINT) or os.environ.get(OTLP_ENDPOINT)
    if not endpoint or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: PLC0415 (an extra)
        from opentelemetry.util.re import parse_env_headers  # noqa: PLC0415 (an extra)
    except ImportError:
        log.warning("tracing.not_installed")  # whole clusters have the address set
        return None
    headers = _optional_secret(TRACES_HEADERS) or _optional_secret(OTLP_HEADERS)
    if headers and not is_safe_address(endpoint):
        raise SettingsError(
            f"{OTLP_ENDPOINT} must start with https:// where {OTLP_HEADERS} is set; plain http is "
            "for loopback."
        )
    return trace_exporter.OTLPSpanExporter(headers=parse_env_headers(headers, liberal=True) or None)


def error_reports(*, release: str) -> Reports | None:
    """
    Where errors go that nobody expected; None if there is no `SENTRY_DSN`.

    Raises:
        SettingsError: it is not usable, or the extra is not installed.
    """
    dsn = _optional_secret(SENTRY)
    if not dsn:
        return None
    try:
        from worker.reporting import Reports  # noqa: PLC0415 (an extra)
    except ImportError:
        raise SettingsError(
            f"{SENTRY} is set, and sentry-sdk is not installed: install "
            "`hlf-dynamics-sync[sentry]`, or unset it."
        ) from None
    if not is_safe_address(re.sub(r"//[^/@]*@", "//", dsn)):  # the key before the host is its own
        raise SettingsError(f"{SENTRY} must start with https://; plain http is for loopback.")
    try:
        return Reports(dsn, release=release)
    except ValueError as error:
        raise SettingsError(f"{SENTRY}: {error}.") from None


def login_secret() -> str:
    """
    What the dashboard proves itself with to the OpenID provider; "" for a client without one.

    Raises:
        SettingsError: it is in a file that cannot be read.
    """
    return _optional_secret(LOGIN_SECRET)


def edge_key(settings: EdgeSettings) -> EdgeKey:
    """
    What adds this organisation's key to requests to its Edge Function, and to nothing else.

    Raises:
        SettingsError: the key is not there.
        ValueError: the address is not usable.
    """
    _secret(EDGE_KEY)
    return EdgeKey(settings.edge_url, partial(_current, EDGE_KEY))


def _current(name: str) -> str:
    try:
        return _secret(name)
    except SettingsError as error:
        raise ConfigurationError("secret_missing", str(error)) from None


def reminder_signature() -> Sign:
    """
    What signs reminders: `(id, time, body)` gives the value of `webhook-signature`.

    Raises:
        SettingsError: the secret is not there, or is none of the Standard Webhooks kind.
    """
    _signing_key()
    return _sign


def _sign(message_id: str, moment: datetime, body: str) -> str:
    try:
        key = _signing_key()
    except SettingsError as error:
        raise ConfigurationError("webhook_secret_missing", str(error)) from None
    return Webhook(key).sign(message_id, moment.astimezone(UTC), body)


def _signing_key() -> bytes:
    """
    Checked here, because the library takes anything and leaves out what is no base64.
    """
    refusal = (
        f"{REMINDER_SECRET} must be whsec_ and {SHORTEST_KEY} to {LONGEST_KEY} random bytes in "
        "base64."
    )
    encoded = _secret(REMINDER_SECRET).removeprefix("whsec_")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise SettingsError(refusal) from None
    if not SHORTEST_KEY <= len(key) <= LONGEST_KEY:
        raise SettingsError(refusal)
    return key


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

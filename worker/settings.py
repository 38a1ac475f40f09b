"""
Every setting that is no secret, read once from the environment and checked together.

Secrets are not here: `worker.credentials` is their only reader.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from uuid import UUID
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.errors import SettingsError


def is_safe_address(url: str) -> bool:
    """
    Whether what is sent there stays between us: https, or plain http on this machine.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    if not parts.hostname or "@" in parts.netloc:
        return False
    loopback = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    return parts.scheme == "https" or (parts.scheme == "http" and loopback)


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError("that is no time zone; write it like Europe/Oslo") from None
    return name


Zone = Annotated[str, AfterValidator(_zone)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


def _separated(value: Any) -> Any:  # noqa: ANN401 (whatever pydantic hands over)
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _none_if_empty(value: Any) -> Any:  # noqa: ANN401 (whatever pydantic hands over)
    return None if value == "" else value


def _falling(thresholds: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(thresholds), reverse=True))


Thresholds = Annotated[
    tuple[Annotated[int, Field(ge=1, le=999)], ...],
    Field(min_length=1),
    NoDecode,
    BeforeValidator(_separated),
    AfterValidator(_falling),
]


class FromEnvironment(BaseSettings):
    """
    Settings that are read from environment variables and never change afterwards.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    @classmethod
    def load(cls) -> Self:
        """
        Read the environment.

        Raises:
            SettingsError: naming every variable that is missing or wrong.
        """
        try:
            return cls()
        except ValidationError as error:
            raise SettingsError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """
    One sentence for all that is wrong; values stay out of it, they may be secret.
    """
    problems = []
    for item in error.errors(include_input=False, include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "missing":
            problems.append(f"{name} is not set")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {reason}" if name else reason)
    return "; ".join(problems) + "."


class Settings(FromEnvironment):
    """
    What every command needs to know.

    Args:
        timezone: of the organisation; in it a certification's last day ends.
        concurrency: requests to Dynamics at once, from this process.
        batch: values in one request at most; 1 for single requests.
        transport: to "dynamics" itself, or through the Edge Function ("edge").
        lease_seconds: how long a claimed event is ours; see `Destination`.
        request_seconds: no attempt takes longer.
        grace_seconds: for requests in flight when the worker is told to stop.
        reminder_days: before the last valid day, the largest first.
        reminder_url: of the webhook that delivers reminders; without it they wait.
        metrics_port: where a worker tells how it is; None for nowhere, 0 for any free one.
    """

    organization_id: UUID = Field(alias="HLF_ORGANIZATION_ID")
    timezone: Zone = Field("Europe/Oslo", alias="HLF_TIMEZONE")
    concurrency: int = Field(8, alias="HLF_SYNC_CONCURRENCY", ge=1, le=100)
    batch: int = Field(1, alias="HLF_SYNC_BATCH", ge=1, le=1000)
    transport: Literal["dynamics", "edge"] = Field("dynamics", alias="HLF_SYNC_TRANSPORT")
    poll_seconds: Seconds = Field(1.0, alias="HLF_SYNC_POLL_SECONDS")
    lease_seconds: Seconds = Field(60.0, alias="HLF_SYNC_LEASE_SECONDS")
    request_seconds: Seconds = Field(5.0, alias="HLF_SYNC_REQUEST_SECONDS")
    grace_seconds: float = Field(20.0, alias="HLF_SYNC_GRACE_SECONDS", ge=0, le=3600)
    reminder_days: Thresholds = Field((60, 30, 7), alias="HLF_REMINDER_DAYS")
    reminder_url: str = Field("", alias="HLF_REMINDER_URL")
    log_format: Literal["console", "json"] = Field("console", alias="HLF_LOG_FORMAT")
    metrics_host: str = Field("127.0.0.1", alias="HLF_METRICS_HOST", min_length=1)
    metrics_port: Annotated[int | None, Field(ge=0, le=65535), BeforeValidator(_none_if_empty)] = (
        Field(None, alias="HLF_METRICS_PORT")
    )

    @model_validator(mode="after")
    def _attempt_fits_its_lease(self) -> Self:
        if self.lease_seconds <= 2 * self.request_seconds:
            raise ValueError(
                "HLF_SYNC_LEASE_SECONDS must be more than twice HLF_SYNC_REQUEST_SECONDS"
            )
        return self

    @model_validator(mode="after")
    def _batches_go_to_dynamics_itself(self) -> Self:
        if self.transport == "edge" and self.batch > 1:
            raise ValueError(
                "HLF_SYNC_BATCH must be 1 with HLF_SYNC_TRANSPORT=edge, which sends single values"
            )
        return self

    def today(self) -> date:
        """
        The date in the organisation's zone, now, by this machine's clock.
        """
        return datetime.now(ZoneInfo(self.timezone)).date()


class TargetSettings(FromEnvironment):
    """
    Where Dynamics is and what to write there; needed by whatever sends.

    Addresses and names are checked where they are used, in `worker.dynamics`.
    """

    url: str = Field(alias="HLF_DYNAMICS_URL")
    entity_set: str = Field("contacts", alias="HLF_DYNAMICS_ENTITY_SET")
    key: str = Field("", alias="HLF_DYNAMICS_KEY")
    column: str = Field("hlf_portalvisible", alias="HLF_DYNAMICS_COLUMN")
    operation: Literal["patch", "action"] = Field("patch", alias="HLF_DYNAMICS_OPERATION")
    action: str = Field("", alias="HLF_DYNAMICS_ACTION")

    @model_validator(mode="after")
    def _action_has_a_name(self) -> Self:
        if self.operation == "action" and not self.action:
            raise ValueError("HLF_DYNAMICS_OPERATION=action needs HLF_DYNAMICS_ACTION")
        return self


class DynamicsSettings(TargetSettings):
    """
    The same, and who asks for tokens; for HLF_SYNC_TRANSPORT=dynamics.
    """

    authority: str = Field("https://login.microsoftonline.com", alias="HLF_DYNAMICS_AUTHORITY")
    tenant_id: str = Field(alias="HLF_DYNAMICS_TENANT_ID", min_length=1)
    client_id: str = Field(alias="HLF_DYNAMICS_CLIENT_ID", min_length=1)


class EdgeSettings(TargetSettings):
    """
    The same, and where the Edge Function is that has the credentials; for
    HLF_SYNC_TRANSPORT=edge.
    """

    edge_url: str = Field(alias="HLF_EDGE_URL")


class DashboardSettings(FromEnvironment):
    """
    Where the dashboard is, and who lets people in.

    Args:
        url: its public address, as people write it; needed with a login.
        issuer: of the OpenID provider. Without one it is for this machine alone.
        audience: of tokens that apps send; the client id if it is not set.
        organization_claim, role_claim: where in a token they are; a dot leads inwards.
    """

    host: str = Field("127.0.0.1", alias="HLF_DASHBOARD_HOST", min_length=1)
    port: int = Field(8080, alias="HLF_DASHBOARD_PORT", ge=0, le=65535)
    url: str = Field("", alias="HLF_DASHBOARD_URL")
    issuer: str = Field("", alias="HLF_OIDC_ISSUER")
    client_id: str = Field("", alias="HLF_OIDC_CLIENT_ID")
    audience: str = Field("", alias="HLF_OIDC_AUDIENCE")
    organization_claim: str = Field(
        "app_metadata.organization_id", alias="HLF_OIDC_ORGANIZATION_CLAIM", min_length=1
    )
    role_claim: str = Field("app_metadata.hlf_role", alias="HLF_OIDC_ROLE_CLAIM", min_length=1)

    @model_validator(mode="after")
    def _login_is_whole(self) -> Self:
        if bool(self.issuer) != bool(self.client_id):
            raise ValueError("HLF_OIDC_ISSUER and HLF_OIDC_CLIENT_ID belong together")
        if self.issuer and not self.url:
            raise ValueError("HLF_OIDC_ISSUER needs HLF_DASHBOARD_URL, the public address")
        for name, url in (("HLF_DASHBOARD_URL", self.url), ("HLF_OIDC_ISSUER", self.issuer)):
            if url and not is_safe_address(url):
                raise ValueError(f"{name} must start with https://; plain http is for loopback")
        if urlsplit(self.url).path.strip("/"):
            raise ValueError("HLF_DASHBOARD_URL must be a scheme and a host (and a port) only")
        return self

"""
What can be turned while the sandbox runs.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.dynamics.sandbox.limits import Limits
from worker.dynamics.sandbox.refusal import SandboxError, sentence


class Privileges(BaseModel):
    """
    What the role of every application user holds; it never holds Read.

    Source: Microsoft Learn, "Security roles and privileges" and "Create and use Custom
    APIs" (ExecutePrivilegeName).

    Args:
        write: prvWrite on every table.
        create: prvCreate on every table. On, so that a client that forgets `If-Match: *`
            is seen to create rows.
        execute: the privilege that the Custom API asks for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    write: bool = True
    create: bool = True
    execute: bool = True


class Settings(BaseModel):
    """
    All of it.

    Args:
        latency_seconds: every answer takes this long; the change is applied at the end.
        token_seconds: lifetime of tokens issued from now on.
        accept_any_row: an unknown key is a row that has always been there.
        privileges: of the role.
        limits: service protection limits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency_seconds: Annotated[float, Field(ge=0, le=600)] = 0.0
    token_seconds: Annotated[int, Field(gt=0)] = 3599
    accept_any_row: bool = False
    privileges: Privileges = Privileges()
    limits: Limits = Limits()

    def changed(self, changes: dict[str, Any]) -> Settings:
        """
        These settings with some changed; what is not named stays, also one level down.

        Raises:
            SandboxError: an unknown name or an impossible value.
        """
        return read_settings(_merged(self.model_dump(), changes))


def read_settings(fields: dict[str, Any]) -> Settings:
    """
    Settings from plain values.

    Raises:
        SandboxError: an unknown name or an impossible value.
    """
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        raise SandboxError(sentence("Wrong settings", error)) from error


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        below = old.get(name)
        both_nested = isinstance(below, dict) and isinstance(value, dict)
        merged[name] = _merged(cast("dict[str, Any]", below), value) if both_nested else value
    return merged

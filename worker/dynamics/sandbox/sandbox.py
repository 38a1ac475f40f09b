"""
The sandbox itself: everything joined, and one method for everything it can be told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from worker.dynamics.sandbox import control, dataverse, entra, http
from worker.dynamics.sandbox.environment import Environment, entry_of
from worker.dynamics.sandbox.faults import Fault, Faults, Standing, read_fault
from worker.dynamics.sandbox.ledger import Entry, Ledger, fingerprint
from worker.dynamics.sandbox.limits import Excess, Limiter
from worker.dynamics.sandbox.refusal import SandboxError, sentence
from worker.dynamics.sandbox.registrations import Directory, Registration
from worker.dynamics.sandbox.rows import Catalogue, EntitySet, Row, Rows
from worker.dynamics.sandbox.settings import Settings, read_settings
from worker.dynamics.sandbox.visit import Visit, act

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from worker.dynamics.sandbox.connection import Exchange
    from worker.dynamics.sandbox.messages import Request, Response

DEFAULT_TENANT = "11111111-1111-4111-8111-111111111111"
DEFAULT_CLIENT_ID = "22222222-2222-4222-8222-222222222222"
DEFAULT_CLIENT_SECRET = "sandbox-secret"  # noqa: S105 - pretended, and printed in the manual
DEFAULT_ENTITY_SET = "contacts"
DEFAULT_COLUMN = "hlf_portalvisible"
DEFAULT_ACTION = "hlf_SetMentorPortalVisibility"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """
    A sandbox that listens.

    Args:
        url: scheme, host and port, without a slash at the end; of the authority as well as
            of the environment.
    """

    url: str


class Sandbox:
    """
    A pretend Entra ID and Dataverse.

    Args:
        registrations: who may ask for tokens; one with the default names if none is given.
        entity_set: the table of mentors.
        column: its visibility column, a boolean.
        keys: its columns that are alternate keys.
        action: the Custom API that sets the column.
        rows: entity set -> GUID -> column -> value, to begin with.
        ledger_path: also append the ledger to this file, as lines of JSON.
        clock: monotonic seconds, for tokens, limits and the ledger.
        settings: see `Settings`.
    """

    def __init__(
        self,
        *,
        registrations: Iterable[Registration | Mapping[str, Any]] = (),
        entity_set: str = DEFAULT_ENTITY_SET,
        column: str = DEFAULT_COLUMN,
        keys: Iterable[str] = (),
        action: str = DEFAULT_ACTION,
        rows: Rows | None = None,
        ledger_path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,  # noqa: ANN401 - validated by Settings
    ) -> None:
        self._settings = read_settings(settings)
        self._clock = clock
        self._directory = Directory()
        self._faults = Faults()
        self._limiter = Limiter()
        self.ledger = Ledger(clock=clock, path=ledger_path)
        self._environment = Environment(
            directory=self._directory,
            catalogue=Catalogue([EntitySet(name=entity_set, columns={column: "Edm.Boolean"})]),
            faults=self._faults,
            ledger=self.ledger,
            settings=lambda: self._settings,
            clock=clock,
            action=action,
            table=entity_set,
            column=column,
        )
        for registration in registrations or (_default_registration(),):
            self.register(registration)
        for key in keys:
            self.define_key(entity_set, key)
        self.put_rows(rows or {})

    # What it can be told; the control endpoints mirror this

    @property
    def rows(self) -> dict[str, dict[str, Row]]:
        """
        Every row: entity set -> GUID -> column -> value; a copy.
        """
        return self._environment.catalogue.snapshot()

    def put_rows(self, rows: Rows) -> None:
        """
        Give the named entity sets these rows and no others.

        A new entity set, and a new column, is defined by being named here.

        Raises:
            SandboxError: an id that is no GUID, or a value that is none of ours.
        """
        self._environment.catalogue.replace(rows)

    def add_rows(self, rows: Rows) -> None:
        """
        Give the named entity sets these rows beside those they have; raises as `put_rows`.
        """
        self._environment.catalogue.add(rows)

    def define_key(self, entity_set: str, column: str) -> None:
        """
        Make a column an alternate key.
        """
        self._environment.catalogue.define(entity_set).define_key(column)

    @property
    def faults(self) -> Sequence[Standing]:
        """
        Faults that are still ordered, oldest first.
        """
        return self._faults.standing

    def order(self, fault: Fault | Mapping[str, Any]) -> int:
        """
        Order a fault.

        Returns:
            Its id, for `call_off`.

        Raises:
            SandboxError: no such fault, or an impossible value.
        """
        return self._faults.add(read_fault(fault) if isinstance(fault, Mapping) else fault)

    def call_off(self, fault_id: int | None = None) -> int:
        """
        Remove a fault, or all of them.

        Returns:
            How many there were.
        """
        return self._faults.remove(fault_id)

    def register(self, registration: Registration | Mapping[str, Any]) -> Registration:
        """
        Add an app registration, or give one a new secret.

        Raises:
            SandboxError: something is missing.
        """
        try:
            checked = Registration.model_validate(registration)
        except ValidationError as error:
            raise SandboxError(sentence("Wrong registration", error)) from error
        self._directory.register(checked)
        return checked

    def revoke(self) -> int:
        """
        Revoke every token.

        Returns:
            How many there were.
        """
        return self._directory.revoke()

    @property
    def settings(self) -> Settings:
        """
        Those in force.
        """
        return self._settings

    def adjust(self, **changes: Any) -> Settings:  # noqa: ANN401 - validated by Settings
        """
        Change settings; what is not named stays, also within `limits` and `privileges`.

        Raises:
            SandboxError: an unknown name or an impossible value; nothing changes then.
        """
        self._settings = self._settings.changed(changes)
        return self._settings

    @asynccontextmanager
    async def serve(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> AsyncIterator[Running]:
        """
        Listen until the block ends; clients that are still connected are dropped.

        Raises:
            SandboxError: the host is not loopback, or the port cannot be had.
        """
        listening = http.serve(
            self._handle, host=host, port=port, clock=self._clock, ssl_context=ssl_context
        )
        try:
            async with listening as url:
                yield Running(url=url)
        finally:
            self.ledger.close()

    # What it does with a request

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.request.path.startswith(control.PREFIX):
            await exchange.send(control.answer(self, exchange.request))
            return
        visit = self._receive(exchange)
        user = visit.entry.client_id if visit.entry.kind in {"data", "read", "batch"} else None
        if user is None:
            await self._attend(visit)
        else:
            await self._attend_within_limits(visit, user)

    async def _attend_within_limits(self, visit: Visit, user: str) -> None:
        limits, started_at = self._settings.limits, visit.entry.started_at
        try:
            if excess := self._limiter.enter(user, limits, now=started_at):
                await visit.send(_throttled(excess))
            else:
                await self._attend(visit)
        finally:
            self._limiter.leave(user, limits, started_at=started_at, now=self._clock())

    async def _attend(self, visit: Visit) -> None:
        fault = self._faults.take(visit.entry)
        await visit.exchange.outlast(self._settings.latency_seconds)
        if fault is None:
            await visit.send(visit.work())
        else:
            await act(fault, visit)

    def _receive(self, exchange: Exchange) -> Visit:
        request = exchange.request
        if request.path.startswith("/api/"):
            return self._receive_data(exchange)
        entry = Entry(kind="other", method=request.method, path=request.path)
        work = _nothing_there
        if entra.TOKEN_PATH.fullmatch(request.path):
            entry.kind, work = "token", lambda: self._answer_token(request, entry)
        elif entra.DISCOVERY_PATH.fullmatch(request.path):
            entry.kind, work = "discovery", lambda: entra.discovery(request, self._directory)
        return self._begin(exchange, entry, work)

    def _receive_data(self, exchange: Exchange) -> Visit:
        call = self._environment.read(exchange.request)
        entry = entry_of(call)
        if not call.is_batch:
            return self._begin(exchange, entry, lambda: self._environment.answer(call, entry))
        parts: list[Entry] = []
        visit = self._begin(exchange, entry, lambda: self._environment.answer_batch(call, parts))
        visit.parts = parts
        return visit

    def _begin(self, exchange: Exchange, entry: Entry, work: Callable[[], Response]) -> Visit:
        self.ledger.begin(entry)
        return Visit(
            exchange,
            entry,
            ledger=self.ledger,
            work=work,
            expire=lambda: self._directory.forget(entry.token),
        )

    def _answer_token(self, request: Request, entry: Entry) -> Response:
        call = entra.read_token_call(request, self._directory)
        entry.client_id = call.client_id or None
        admitted = entra.admit(call)
        if not isinstance(admitted, Registration):
            return admitted
        seconds = self._settings.token_seconds
        text = self._directory.issue(
            admitted,
            resource=call.resource,
            expires_at=self._clock() + seconds,
        )
        entry.token = fingerprint(text)
        self.ledger.note_applied(entry)
        return entra.granted(text, seconds=seconds)


def _default_registration() -> Registration:
    return Registration(
        tenant=DEFAULT_TENANT,
        client_id=DEFAULT_CLIENT_ID,
        client_secret=DEFAULT_CLIENT_SECRET,
    )


def _nothing_there() -> Response:
    return dataverse.error(404, "", "There is nothing here.")


def _throttled(excess: Excess) -> Response:
    retry_after = (("Retry-After", str(excess.retry_after)),)
    return dataverse.error(429, excess.code, excess.message, headers=retry_after)

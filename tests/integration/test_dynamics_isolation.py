"""
Service, client and token together against the sandbox: what goes where, and what never does.

What takes a `road` holds for the Edge Function, too.
"""

from __future__ import annotations

import logging
import traceback
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from outbox.errors import ConfigurationError, DeliveryError, PermanentError, TransientError
from outbox.outcome import Delivered
from tests.integration import edge_function
from tests.integration.roads import HLF, ROADS, Credentials, OpenRoad, Road
from worker.dynamics import DynamicsTarget, HLFDynamicsSyncService, MentorLink
from worker.dynamics.sandbox import (
    DEFAULT_ACTION,
    DEFAULT_CLIENT_ID,
    DEFAULT_COLUMN,
    DEFAULT_TENANT,
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    Oversized,
    Redirect,
    Registration,
    ResetAfter,
    ResetBefore,
    Sandbox,
    Status,
    Truncated,
    applied,
    reads,
    registrations,
    values,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

SECRET = "canary-secret-5b1e"  # noqa: S105 - it is to be looked for, not to be used
MENTOR = UUID("00000000-0000-4000-8000-0000000000a1")
RECORD = UUID("00000000-0000-4000-8000-0000000000b1")
GENEROUS_SECONDS = 30.0
TOKEN = "canary-token-9c0d"  # noqa: S105 - as above


@pytest.fixture(params=list(ROADS))
def road(request: pytest.FixtureRequest) -> Road:
    """
    Each of the two.
    """
    return ROADS[request.param]


class House:
    """
    One organisation's side: a service with the road that belongs to it.
    """

    def __init__(self, road: OpenRoad) -> None:
        self.road = road
        self.link = MentorLink(organization_id=HLF, dynamics_id=RECORD)
        self.service = HLFDynamicsSyncService(
            road.client, organization_id=HLF, find_mentor=self.find
        )

    async def find(self, _mentor_id: UUID) -> MentorLink:
        """
        Every mentor has the same link.
        """
        return self.link

    async def show(self, *, seconds: float = GENEROUS_SECONDS) -> None:
        """
        Make the mentor visible.
        """
        outcome = await self.service.update_portal_visibility(MENTOR, visible=True, seconds=seconds)
        assert outcome == Delivered()


def sandbox_of_hlf(*, keys: tuple[str, ...] = ()) -> Sandbox:
    """
    One hidden mentor, and HLF's application.
    """
    row: dict[str, object] = {DEFAULT_COLUMN: False, **dict.fromkeys(keys, str(MENTOR))}
    return Sandbox(
        registrations=[
            Registration(tenant=DEFAULT_TENANT, client_id=DEFAULT_CLIENT_ID, client_secret=SECRET)
        ],
        keys=keys,
        rows={"contacts": {str(RECORD): row}},
    )


@asynccontextmanager
async def house(
    road: Road,
    authority: str,
    *,
    secret: str = SECRET,
    fields: Mapping[str, str] | None = None,
    url: str | None = None,
) -> AsyncIterator[House]:
    """
    HLF's side, with its credentials for what is at `authority` and a target at `url`.
    """
    target = DynamicsTarget(url=url or authority, **(fields or {}))  # type: ignore[arg-type]  # strings
    credentials = Credentials(authority=authority, resource=authority, secret=secret)
    async with road.open(target, credentials) as opened:
        yield House(opened)


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ((), {}),
        (("hlf_mentorid",), {"key": "hlf_mentorid"}),
        ((), {"operation": "action", "action": DEFAULT_ACTION}),
    ],
    ids=["guid", "alternate key", "custom api"],
)
async def test_a_mentor_becomes_visible_by_every_road(
    road: Road, keys: tuple[str, ...], fields: dict[str, str]
) -> None:
    """
    One write, no read, one token for two calls.
    """
    sandbox = sandbox_of_hlf(keys=keys)
    async with sandbox.serve() as running, house(road, running.url, fields=fields) as hlf:
        await hlf.show()
        await hlf.show()
    assert values(sandbox.ledger.entries) == {str(RECORD): [True, True]}
    assert reads(sandbox.ledger.entries) == []
    assert [entry.kind for entry in sandbox.ledger.entries] == ["token", "data", "data"]


async def test_a_record_that_is_missing_is_not_created(road: Road) -> None:
    """
    A wrong id must not make an empty person.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        hlf.link = MentorLink(organization_id=HLF, dynamics_id=uuid4())
        with pytest.raises(PermanentError) as raised:
            await hlf.show()
    assert raised.value.code == "record_not_found"
    assert list(sandbox.rows["contacts"]) == [str(RECORD)]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"entity_set": "kontakter"}, "wrong_address"),
        ({"column": "hlf_synlig"}, "payload_refused"),
        ({"key": "hlf_mentorno"}, "key_not_defined"),
        ({"operation": "action", "action": "hlf_Nothing"}, "wrong_address"),
    ],
)
async def test_a_wrong_target_stops_everybody_instead_of_giving_mentors_up(
    road: Road, fields: dict[str, str], code: str
) -> None:
    """
    It is wrong for every mentor alike.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url, fields=fields) as hlf:
        with pytest.raises(ConfigurationError) as raised:
            await hlf.show()
    assert raised.value.code == code


async def test_an_expired_token_costs_no_attempt(road: Road) -> None:
    """
    It is renewed and the request repeated within the same call.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        await hlf.show()
        sandbox.revoke()
        await hlf.show()
        sandbox.order(ExpireToken())
        await hlf.show()
    statuses = [(entry.kind, entry.status) for entry in sandbox.ledger.entries]
    renewal = [("data", 401), ("token", 200), ("data", 204)]
    assert statuses == [("token", 200), ("data", 204), *renewal, *renewal]


async def test_a_token_that_is_never_accepted_is_a_matter_of_configuration(road: Road) -> None:
    """
    After one renewal, not in a loop.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        sandbox.order(ExpireToken(times=None))
        with pytest.raises(ConfigurationError) as raised:
            await hlf.show()
    assert raised.value.code == "unauthorized"
    assert [entry.kind for entry in sandbox.ledger.entries] == ["token", "data"] * 2


async def test_a_wrong_secret_sends_nothing_to_dynamics(road: Road) -> None:
    """
    And gives no mentor up.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url, secret="old") as hlf:
        with pytest.raises(ConfigurationError) as raised:
            await hlf.show()
    assert raised.value.code == "token_refused"
    assert "invalid_client" in raised.value.message
    assert [entry.kind for entry in sandbox.ledger.entries] == ["token"]


async def test_a_deadline_that_passes_while_the_token_is_fetched_is_not_doubtful(
    road: Road,
) -> None:
    """
    Dynamics was asked nothing.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        sandbox.order(Hang(target="token"))
        with pytest.raises(TransientError) as raised:
            await hlf.show(seconds=road.deadline(0.2))
    assert raised.value.code == "timeout"
    assert not raised.value.doubtful
    assert not any(entry.kind == "data" for entry in sandbox.ledger.entries)


async def test_a_lost_answer_is_doubtful_and_sending_again_is_harmless(road: Road) -> None:
    """
    The change took effect, and takes effect once more.
    """
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        sandbox.order(ResetAfter(target="data"))
        with pytest.raises(TransientError) as raised:
            await hlf.show()
        assert raised.value.doubtful
        await hlf.show()
    assert values(sandbox.ledger.entries) == {str(RECORD): [True, True]}


@pytest.mark.parametrize("target", ["token", "data"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_carries_no_credentials_to_another_organisation(
    road: Road, target: str, status: int
) -> None:
    """
    Neither from the authority nor from Dynamics is one followed.
    """
    ours, theirs = sandbox_of_hlf(), sandbox_of_hlf()
    async with ours.serve() as running, theirs.serve() as other, house(road, running.url) as hlf:
        fault = {"what": "redirect", "target": target, "status": status, "location": other.url}
        ours.order(fault)
        with pytest.raises(ConfigurationError) as raised:
            await hlf.show()
    assert raised.value.code == "redirect_refused"
    assert theirs.ledger.entries == ()


async def test_a_client_for_another_host_gets_no_token(road: Road) -> None:
    """
    Not even a connection is made there.
    """
    ours, theirs = sandbox_of_hlf(), sandbox_of_hlf()
    async with (
        ours.serve() as running,
        theirs.serve() as other,
        house(road, running.url, url=other.url) as hlf,
    ):
        with pytest.raises(ConfigurationError) as raised:
            await hlf.show()
    assert raised.value.code == {"direct": "other_host", "edge": "edge_other_target"}[road.name]
    assert not raised.value.doubtful
    assert ours.ledger.entries == theirs.ledger.entries == ()


async def test_two_organisations_in_one_process_share_nothing(road: Road) -> None:
    """
    Each host sees its own application's token only.
    """
    ours, theirs = sandbox_of_hlf(), sandbox_of_hlf()
    async with (
        ours.serve() as running,
        theirs.serve() as other,
        house(road, running.url) as hlf,
        house(road, other.url) as nhf,
    ):
        await hlf.show()
        await nhf.show()
        ours.revoke()
        await nhf.show()
    tokens = [{e.token for e in s.ledger.entries} for s in (ours, theirs)]
    assert tokens[0].isdisjoint(tokens[1])
    assert [len(applied(s.ledger.entries)) for s in (ours, theirs)] == [1, 2]


def everything_said(error: BaseException) -> str:
    """
    All that could end up in a log: texts, attributes and tracebacks with local variables, of
    the error and of all it hangs on.
    """
    said: list[str] = []
    current: BaseException | None = error
    while current is not None:
        said += [str(current), repr(current), repr(current.args), repr(vars(current))]
        said += traceback.TracebackException.from_exception(current, capture_locals=True).format()
        current = current.__cause__ or current.__context__
    return "\n".join(said)


ELSEWHERE = "https://elsewhere.example/"
FAULTS: list[Fault] = [
    fault
    for target in ("token", "data")
    for fault in (
        Status(target=target, status=400, message=SECRET),
        Status(target=target, status=401, times=2),
        Status(target=target, status=403, code="0x80040220", message=SECRET),
        Status(target=target, status=404),
        Status(target=target, status=429, retry_after="x"),
        Status(target=target, status=503),
        Drip(target=target, seconds=0.05),
        ResetBefore(target=target),
        ResetAfter(target=target),
        Hang(target=target),
        Garbage(target=target),
        Html(target=target),
        Truncated(target=target),
        Oversized(target=target),
        Redirect(target=target, location=ELSEWHERE),
    )
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.target} {fault.what}")
async def test_no_error_and_no_log_holds_a_secret_a_token_or_a_key(
    road: Road, fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whatever goes wrong, with every logger at its most talkative; nor does what the function
    prints.
    """
    caplog.set_level(logging.DEBUG)
    known = SimpleNamespace(token_urlsafe=lambda _: f"{TOKEN}-{uuid4().hex}")
    monkeypatch.setattr(registrations, "secrets", known)
    sandbox = sandbox_of_hlf()
    async with sandbox.serve() as running, house(road, running.url) as hlf:
        if fault.target == "data":
            await hlf.show()
        sandbox.order(fault)
        with capture_logs() as logs:
            error = await failure_of(hlf)
        assert sandbox.ledger.entries or sandbox.ledger.in_progress
    said = f"{everything_said(error)}\n{caplog.text}\n{logs}\n{hlf.road.overheard()}"
    for canary in (SECRET, TOKEN, edge_function.KEY, "Bearer"):
        assert canary not in said


async def failure_of(hlf: House) -> DeliveryError:
    """
    The error of one call, which hangs on no other.
    """
    with pytest.raises(DeliveryError) as raised:
        await hlf.show(seconds=0.5)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    return raised.value

"""
The Edge Function in Deno: whom it lets in, what it takes for a question, what it keeps to itself.

What it does with a proper question is in `test_dynamics_client` and `test_dynamics_isolation`.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx
import pytest
import trustme

from outbox.errors import ConfigurationError, DeliveryError
from tests.integration import edge_function
from tests.integration.roads import HLF, Credentials, settings_of_function
from tests.integration.sandbox_api import NO_TRUST
from tests.integration.test_dynamics_client import NO_CONTENT, TOKEN, json_answer, says, serving
from worker.dynamics import DynamicsTarget, EdgeKey, edge_client
from worker.dynamics.sandbox import (
    DEFAULT_CLIENT_ID,
    DEFAULT_COLUMN,
    DEFAULT_TENANT,
    Hang,
    Registration,
    Sandbox,
    values,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.dynamics import EdgeClient

SECRET = "canary-77de-client-secret"  # noqa: S105 (of the sandbox)
KEY = edge_function.KEY
RECORD = "00000000-0000-4000-8000-0000000000b1"
EVENT = "00000000-0000-4000-8000-0000000000e1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """
    A function that runs, and the pretend Dynamics behind it.
    """

    sandbox: Sandbox
    url: str
    lines: list[str]
    target: DynamicsTarget
    http: httpx.AsyncClient

    def question(self, **fields: object) -> dict[str, object]:
        """
        A proper one, some fields of which are others.
        """
        change = {"row": RECORD, "visible": True, "correlation_id": EVENT}
        return {
            "organization_id": str(HLF),
            "target": asdict(self.target),
            "seconds": 10,
            "change": change,
            **fields,
        }

    async def ask(self, question: object, *, key: str = KEY) -> httpx.Response:
        """
        Ask it.
        """
        return await self.http.post(
            self.url, json=question, headers={"Authorization": f"Bearer {key}".strip()}
        )

    def client(
        self, *, target: DynamicsTarget | None = None, organization_id: UUID = HLF, key: str = KEY
    ) -> EdgeClient:
        """
        The worker's client of it.
        """
        return edge_client(
            target or self.target,
            organization_id=organization_id,
            url=self.url,
            key=EdgeKey(self.url, lambda: key),
        )


@asynccontextmanager
async def place(**settings: str) -> AsyncIterator[Place]:
    """
    A function with all its settings, some of which are others.
    """
    registration = Registration(
        tenant=DEFAULT_TENANT, client_id=DEFAULT_CLIENT_ID, client_secret=SECRET
    )
    sandbox = Sandbox(
        registrations=[registration], rows={"contacts": {RECORD: {DEFAULT_COLUMN: False}}}
    )
    async with sandbox.serve() as dynamics:
        target = DynamicsTarget(url=dynamics.url)
        credentials = Credentials(authority=dynamics.url, resource=dynamics.url, secret=SECRET)
        told = settings_of_function(target, credentials) | settings
        async with (
            edge_function.running(told) as function,
            httpx.AsyncClient(verify=NO_TRUST) as http,
        ):
            yield Place(
                sandbox=sandbox, url=function.url, lines=function.lines, target=target, http=http
            )
    said = "".join(function.lines)
    assert not [canary for canary in (SECRET, KEY, RECORD, "Bearer") if canary in said]


async def show(client: EdgeClient) -> None:
    """
    One request.
    """
    await client.set_visibility(RECORD, visible=True, seconds=30, correlation_id=UUID(EVENT))


async def failure_of(client: EdgeClient) -> DeliveryError:
    """
    The error of one request.
    """
    async with client:
        with pytest.raises(DeliveryError) as raised:
            await show(client)
    return raised.value


# ---------------------------------------------------------------------------- who


async def test_without_the_key_nobody_is_let_in_or_told_anything() -> None:
    """
    Nor is anything sent on.
    """
    async with place() as here:
        for key in ("", "x", KEY[:-1], f"{KEY}x", KEY.upper()):
            answer = await here.ask(here.question(), key=key)
            assert (answer.status_code, answer.json()) == (
                401,
                {"outcome": "refused", "code": "key_refused"},
            )
        answer = await here.http.post(here.url, json=here.question())
        assert answer.status_code == 401
        error = await failure_of(here.client(key="another-key"))
    assert isinstance(error, ConfigurationError)
    assert error.code == "edge_key_refused"
    assert here.sandbox.ledger.entries == ()


async def test_the_previous_key_lets_in_while_the_workers_learn_the_new_one() -> None:
    """
    So that a key is changed without a pause.
    """
    old = "the-previous-key-of-32-characters-and-more"
    async with place(HLF_EDGE_KEY_PREVIOUS=old) as here:
        for key in (old, KEY):
            async with here.client(key=key) as client:
                await show(client)


@pytest.mark.parametrize("key", ["", "a-key-of-31-characters-is-short"])
async def test_a_key_that_is_missing_or_short_lets_nobody_in(key: str) -> None:
    """
    Whoever set it up sees why.
    """
    async with place(HLF_EDGE_KEY=key) as here:
        answer = await here.ask(here.question(), key=key)
    assert answer.status_code == 401
    assert answer.json()["code"] == "no_key_of_32_characters_set"


# --------------------------------------------------------------------------- what


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_only_post_is_taken(method: str) -> None:
    """
    Key or not.
    """
    async with place() as here:
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = await here.http.request(method, here.url, headers=headers)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


CHANGE = {"row": RECORD, "visible": True, "correlation_id": EVENT}
NONSENSE: list[dict[str, Any]] = [
    {"organization_id": "hlf"},
    {"organization_id": None},
    {"target": {}},
    {"target": "contacts"},
    {"seconds": 0},
    {"seconds": -1},
    {"seconds": "5"},
    {"change": "show"},
    {"change": {}},
    {"change": CHANGE | {"visible": 1}},
    {"change": CHANGE | {"row": "1)/owner(2"}},
    {"change": CHANGE | {"row": ""}},
    {"change": CHANGE | {"correlation_id": "x\r\nAuthorization: y"}},
    {"change": CHANGE | {"more": 1}},
    {"more": 1},
]


async def test_what_is_no_question_gets_nowhere() -> None:
    """
    Nothing more and nothing less than a question is one.
    """
    headers = {"Authorization": f"Bearer {KEY}"}
    async with place() as here:
        for fields in NONSENSE:
            answer = await here.ask(here.question(**fields))
            assert (fields, answer.status_code) == (fields, 400)
        documents: tuple[object, ...] = ([], 7, "x", {})
        for document in documents:
            assert (await here.ask(document)).status_code == 400
        typed = headers | {"Content-Type": "application/json"}
        answer = await here.http.post(here.url, content=b"{\xff", headers=typed)
        assert answer.status_code == 400
        answer = await here.http.post(here.url, content=b"{}", headers=headers)
        assert answer.status_code == 415
        answer = await here.ask(here.question(more="x" * 4096))
        assert answer.status_code == 413
    assert here.sandbox.ledger.entries == ()


async def test_another_organisation_and_another_target_are_refused() -> None:
    """
    A key sets one field of one table in one Dynamics, whoever has it.
    """
    async with place() as here:
        url = here.target.url
        others = [
            DynamicsTarget(url="https://other.crm4.dynamics.example"),
            DynamicsTarget(url="http://localhost:9"),
            DynamicsTarget(url=url, entity_set="accounts"),
            DynamicsTarget(url=url, column="emailaddress1"),
            DynamicsTarget(url=url, key="fullname"),
            DynamicsTarget(url=url, operation="action", action="hlf_DeleteAll"),
        ]
        errors = [await failure_of(here.client(target=target)) for target in others]
        stranger = await failure_of(here.client(organization_id=uuid4()))
    assert {error.code for error in errors} == {"edge_other_target"}
    assert stranger.code == "edge_other_organization"
    assert all(isinstance(error, ConfigurationError) for error in (*errors, stranger))
    assert here.sandbox.ledger.entries == ()


async def test_a_target_may_be_spelt_otherwise() -> None:
    """
    A slash at the end makes no other Dynamics.
    """
    async with (
        place() as here,
        here.client(target=DynamicsTarget(url=f"{here.target.url}/")) as client,
    ):
        await show(client)
    assert values(here.sandbox.ledger.entries) == {RECORD: [True]}


# ----------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HLF_ORGANIZATION_ID", "hlf"),
        ("HLF_DYNAMICS_URL", "http://hlf.crm4.dynamics.example"),
        ("HLF_DYNAMICS_URL", "https://hlf.example/path"),
        ("HLF_DYNAMICS_URL", ""),
        ("HLF_DYNAMICS_AUTHORITY", "http://login.example"),
        ("HLF_DYNAMICS_TENANT_ID", "../x"),
        ("HLF_DYNAMICS_CLIENT_ID", ""),
        ("HLF_DYNAMICS_CLIENT_SECRET", ""),
        ("HLF_DYNAMICS_ENTITY_SET", "contacts(x)"),
        ("HLF_DYNAMICS_COLUMN", "a/b"),
        ("HLF_DYNAMICS_KEY", "a b"),
        ("HLF_DYNAMICS_OPERATION", "delete"),
    ],
)
async def test_a_setting_that_is_missing_or_wrong_is_named_to_the_worker(
    name: str, value: str
) -> None:
    """
    Its name only; the gate closes until somebody mends it.
    """
    async with place(**{name: value}) as here:
        error = await failure_of(here.client())
    assert isinstance(error, ConfigurationError)
    assert error.code == "edge_not_set_up"
    assert f"({name})" in error.message
    assert here.sandbox.ledger.entries == ()


# -------------------------------------------------------------------------- token


async def test_many_questions_at_once_share_one_token() -> None:
    """
    One token request, then one request each.
    """
    async with place() as here, here.client() as client:
        await asyncio.gather(*(show(client) for _ in range(20)))
    kinds = [entry.kind for entry in here.sandbox.ledger.entries]
    assert kinds.count("token") == 1
    assert kinds.count("data") == 20


async def test_a_proof_gets_a_token_and_touches_no_record() -> None:
    """
    For the doctor.
    """
    async with place() as here, here.client() as client:
        await client.prove(seconds=30)
    assert [entry.kind for entry in here.sandbox.ledger.entries] == ["token"]


async def test_the_function_says_what_it_knows_before_our_deadline() -> None:
    """
    That Dynamics was late, not that the function was; and in the verdict that it is doubtful.
    """
    async with place() as here:
        here.sandbox.order(Hang(target="data"))
        answer = await here.ask(here.question(seconds=0.3))
    assert answer.status_code == 200
    assert answer.json() == {
        "outcome": "failed",
        "class": "transient",
        "code": "timeout",
        "message": "Dynamics did not answer in time.",
        "retry_after": None,
        "doubtful": True,
    }


# ---------------------------------------------------------------------------- TLS


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_certificate_that_is_not_trusted_is_a_matter_of_configuration(
    tmp_path_factory: pytest.TempPathFactory, *, trusted: bool
) -> None:
    """
    Nothing is sent, so nothing is doubtful; with one that is trusted it works.
    """
    authority = trustme.CA()
    file = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    trust = {"DENO_CERT": str(file)} if trusted else {}
    async with (
        serving(says(json_answer("200 OK", TOKEN))) as entra,
        serving(says(NO_CONTENT), tls=tls) as dynamics,
        place(HLF_DYNAMICS_URL=dynamics.url, HLF_DYNAMICS_AUTHORITY=entra.url, **trust) as here,
        here.client(target=DynamicsTarget(url=dynamics.url)) as client,
    ):
        if trusted:
            await show(client)
            return
        with pytest.raises(ConfigurationError) as raised:
            await show(client)
    assert raised.value.code == "certificate"
    assert not raised.value.doubtful
    assert dynamics.requests == []

"""
The sandbox over real sockets: tokens, changes, the Custom API, $batch and limits.
"""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote_plus

import httpx
import pytest

from tests.integration.sandbox_api import (
    HIDE,
    NO_ROW,
    OTHER_ROW,
    ROW,
    Api,
    SteppedClock,
    code,
    serving,
    visible,
)
from worker.dynamics.sandbox import (
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_TENANT,
    Hang,
    Limits,
    Privileges,
    Registration,
    ResetAfter,
    Sandbox,
    Status,
    applied,
    overlaps,
    reads,
    values,
)

THEIRS = "another secret"


@pytest.fixture
def clock() -> SteppedClock:
    """
    A clock that stands still.
    """
    return SteppedClock()


# Tokens


async def test_right_credentials_get_a_bearer_token() -> None:
    """
    The answer has the fields and the lifetime that Entra ID documents.
    """
    async with serving() as (_, api):
        answer = await api.ask_token()

        assert answer.status_code == 200
        assert answer.json() | {"access_token": ""} == {
            "token_type": "Bearer",
            "expires_in": 3599,
            "ext_expires_in": 3599,
            "access_token": "",
        }


async def test_credentials_may_come_by_basic_authentication() -> None:
    """
    Client id and secret in the Authorization header are as good as in the form.
    """
    async with serving() as (_, api):
        form = {"grant_type": "client_credentials", "scope": f"{api.url}/.default"}
        basic = httpx.BasicAuth(DEFAULT_CLIENT_ID, DEFAULT_CLIENT_SECRET)

        url = f"/{DEFAULT_TENANT}/oauth2/v2.0/token"
        answer = await api.http.post(url, data=form, auth=basic)

        assert answer.status_code == 200


async def test_basic_authentication_is_form_encoded() -> None:
    """
    A secret with any character arrives whole, as RFC 6749 has it.
    """
    awkward = "a+b:c/d=%&ø "
    async with serving() as (sandbox, api):
        sandbox.register({"tenant": "t", "client_id": "c:d", "client_secret": awkward})
        basic = httpx.BasicAuth(quote_plus("c:d"), quote_plus(awkward))
        form = {"grant_type": "client_credentials", "scope": f"{api.url}/.default"}

        answer = await api.http.post("/t/oauth2/v2.0/token", data=form, auth=basic)

        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("form", "tenant", "status", "error", "number"),
    [
        ({"client_secret": "wrong"}, DEFAULT_TENANT, 401, "invalid_client", 7000215),
        ({"client_secret": None}, DEFAULT_TENANT, 401, "invalid_client", 7000216),
        ({"client_id": "stranger"}, DEFAULT_TENANT, 400, "unauthorized_client", 700016),
        ({"client_id": None}, DEFAULT_TENANT, 400, "invalid_request", 900144),
        ({"grant_type": "password"}, DEFAULT_TENANT, 400, "unsupported_grant_type", 70003),
        ({"grant_type": None}, DEFAULT_TENANT, 400, "invalid_request", 900144),
        ({"scope": None}, DEFAULT_TENANT, 400, "invalid_request", 900144),
        ({"scope": "http://127.0.0.1"}, DEFAULT_TENANT, 400, "invalid_scope", 1002012),
        ({"scope": "/.default"}, DEFAULT_TENANT, 400, "invalid_scope", 1002012),
        ({"scope": "a/.default b/.default"}, DEFAULT_TENANT, 400, "invalid_scope", 70011),
        ({}, "no-such-tenant", 400, "invalid_request", 90002),
    ],
)
async def test_a_bad_token_request_gets_entras_error(
    form: dict[str, str | None], tenant: str, status: int, error: str, number: int
) -> None:
    """
    Status, error word and all six fields of the error are as Entra ID gives them.
    """
    async with serving() as (_, api):
        answer = await api.ask_token(tenant=tenant, **form)

        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert answer.json()["error_codes"] == [number]
        assert answer.json()["error_description"].startswith(f"AADSTS{number}: ")
        assert set(answer.json()) == {
            "error",
            "error_description",
            "error_codes",
            "timestamp",
            "trace_id",
            "correlation_id",
        }


async def test_a_token_is_asked_for_by_post_only() -> None:
    """
    GET at the token endpoint is refused.
    """
    async with serving() as (_, api):
        answer = await api.http.get(f"/{DEFAULT_TENANT}/oauth2/v2.0/token")

        assert answer.json()["error_codes"] == [900561]


async def test_malformed_basic_authentication_is_no_credential() -> None:
    """
    A header that is no base64 counts as no client id.
    """
    async with serving() as (_, api):
        answer = await api.http.post(
            f"/{DEFAULT_TENANT}/oauth2/v2.0/token",
            data={"grant_type": "client_credentials"},
            headers={"Authorization": "Basic ???"},
        )

        assert answer.json()["error"] == "invalid_request"


async def test_discovery_names_the_address_the_client_used() -> None:
    """
    The metadata is built from the Host of the request, so a proxy in between works.
    """
    async with serving() as (_, api):
        path = f"/{DEFAULT_TENANT}/v2.0/.well-known/openid-configuration"

        answer = await api.http.get(path, headers={"Host": "authority.test:1234"})

        expected = f"http://authority.test:1234/{DEFAULT_TENANT}/oauth2/v2.0/token"
        assert answer.json()["token_endpoint"] == expected


async def test_discovery_of_an_unknown_tenant_is_refused() -> None:
    """
    A tenant without registrations does not exist.
    """
    async with serving() as (_, api):
        answer = await api.http.get("/nowhere/v2.0/.well-known/openid-configuration")

        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_tenant")


async def test_one_organisations_credentials_never_serve_another() -> None:
    """
    A secret works in its own tenant and for its own client only.
    """
    other = Registration(tenant="other", client_id="their-app", client_secret=THEIRS)
    async with serving() as (sandbox, api):
        sandbox.register(other)

        across = await api.ask_token(tenant="other")
        mixed = await api.ask_token(tenant="other", client_id="their-app")
        own = await api.ask_token(tenant="other", client_id="their-app", client_secret=THEIRS)

        assert across.json()["error"] == "unauthorized_client"
        assert mixed.json()["error"] == "invalid_client"
        assert own.status_code == 200


async def test_a_user_of_another_environment_is_refused() -> None:
    """
    A token of an application that is no user here is good for nothing here.
    """
    stranger = Registration(
        tenant=DEFAULT_TENANT, client_id="app", client_secret=THEIRS, hosts=("elsewhere.test",)
    )
    async with serving() as (sandbox, api):
        sandbox.register(stranger)
        answer = await api.ask_token(client_id="app", client_secret=THEIRS)
        api.token = answer.json()["access_token"]

        refused = await api.patch()

        assert (refused.status_code, code(refused)) == (403, "0x80072560")
        assert visible(sandbox) is True


async def test_a_replaced_secret_stops_working() -> None:
    """
    Registering a client again rotates its secret.
    """
    async with serving() as (sandbox, api):
        sandbox.register(
            {
                "tenant": DEFAULT_TENANT,
                "client_id": DEFAULT_CLIENT_ID,
                "client_secret": THEIRS,
            }
        )

        assert (await api.ask_token()).status_code == 401
        assert (await api.ask_token(client_secret=THEIRS)).status_code == 200


# Changing a row


async def test_an_update_by_guid_answers_204_with_the_rows_address() -> None:
    """
    The change is applied, and the answer has Dataverse's headers and no body.
    """
    async with serving() as (sandbox, api):
        answer = await api.patch(ROW.upper())

        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["OData-Version"] == "4.0"
        assert answer.headers["OData-EntityId"] == f"{api.url}/api/data/v9.2/contacts({ROW})"
        assert answer.headers["x-ms-service-request-id"] == answer.headers["REQ_ID"]
        assert visible(sandbox) is False


@pytest.mark.parametrize("key", ["hlf_no='o''Neil %26 co'", f"hlf_mentor={OTHER_ROW}"])
async def test_an_update_by_alternate_key_finds_the_row(key: str) -> None:
    """
    Text in quotes (doubled inside) and bare values both address the row.
    """
    keys = {"hlf_no": "o'Neil & co", "hlf_mentor": OTHER_ROW}
    rows = {"contacts": {ROW: {"hlf_portalvisible": True, **keys}}}
    async with serving(Sandbox(rows=rows, keys=["hlf_no", "hlf_mentor"])) as (sandbox, api):
        answer = await api.patch(key)

        assert answer.status_code == 204
        assert sandbox.ledger.entries[-1].row == ROW
        assert visible(sandbox) is False


async def test_without_if_match_an_unknown_guid_is_created() -> None:
    """
    PATCH alone is an upsert, which is why a client must send If-Match.
    """
    async with serving() as (sandbox, api):
        answer = await api.patch(NO_ROW, If_Match=None)

        assert answer.status_code == 204
        assert visible(sandbox, NO_ROW) is False
        assert sandbox.ledger.entries[-1].created


async def test_without_if_match_an_unknown_key_is_created_with_its_value() -> None:
    """
    An upsert by alternate key stores the key, so that it is found the next time.
    """
    async with serving(Sandbox(keys=["hlf_no"])) as (sandbox, api):
        await api.patch("hlf_no='7'", If_Match=None)
        again = await api.patch("hlf_no='7'", {"hlf_portalvisible": True})

        assert again.status_code == 204
        assert list(sandbox.rows["contacts"].values()) == [
            {"hlf_no": "7", "hlf_portalvisible": True}
        ]


async def test_any_row_may_be_accepted() -> None:
    """
    For load tests unknown keys count as rows that have always been there.
    """
    async with serving(keys=["hlf_no"], accept_any_row=True) as (sandbox, api):
        by_guid = await api.patch(NO_ROW)
        by_key = await api.patch("hlf_no='7'")
        by_undefined_key = await api.patch("name='7'")
        by_nonsense = await api.act({"MentorId": "", "Visible": False})

        assert [by_guid.status_code, by_key.status_code] == [204, 204]
        assert code(by_undefined_key) == "0x80060890"
        assert code(by_nonsense) == "0x80048d19"
        assert not any(entry.created for entry in sandbox.ledger.entries)
        assert len(sandbox.rows["contacts"]) == 4


@pytest.mark.parametrize(
    ("row", "body", "headers", "status", "error_code"),
    [
        (NO_ROW, HIDE, {}, 404, "0x80040217"),
        ("hlf_no='7'", HIDE, {}, 404, "0x80060891"),
        ("name='7'", HIDE, {}, 400, "0x80060890"),
        ("hlf_no='7',hlf_no='8'", HIDE, {}, 400, "0x80060890"),
        ("not-a-key", HIDE, {}, 400, "0x80060888"),
        (ROW, HIDE, {"If_Match": None, "If_None_Match": "*"}, 412, ""),
        (ROW, HIDE, {"If_Match": 'W/"1"'}, 412, "0x80060882"),
        (ROW, HIDE, {"Prefer": "return=representation"}, 403, "0x80040220"),
        (ROW, HIDE, {"OData_Version": None}, 400, ""),
        (ROW, HIDE, {"OData_MaxVersion": "3.0"}, 400, ""),
        (ROW, HIDE, {"Accept": "*/*"}, 400, ""),
        (ROW, HIDE, {"Content_Type": "text/plain"}, 415, ""),
        (ROW, [HIDE], {}, 400, "0x80048d19"),
        (ROW, {"hlf_portalvisable": False}, {}, 400, "0x80048d19"),
        (ROW, {"hlf_portalvisible": "false"}, {}, 400, "0x80048d19"),
        (ROW, {"hlf_portalvisible": 0}, {}, 400, "0x80048d19"),
        (ROW, {"hlf_portalvisible": None}, {}, 400, "0x80048d19"),
        (ROW, {"hlf_no": 7}, {}, 400, "0x80048d19"),
    ],
)
async def test_a_bad_change_is_refused_and_changes_nothing(
    row: str, body: object, headers: dict[str, str | None], status: int, error_code: str
) -> None:
    """
    Each rule answers with its status and code.
    """
    async with serving(keys=["hlf_no"]) as (sandbox, api):
        before = sandbox.rows

        answer = await api.patch(row, body, **headers)

        assert (answer.status_code, code(answer)) == (status, error_code)
        assert sandbox.rows == before
        assert sandbox.ledger.entries[-1].code == error_code
        assert not sandbox.ledger.entries[-1].applied


async def test_an_unknown_entity_set_is_told_apart_from_a_missing_row() -> None:
    """
    Both are 404; the code says which.
    """
    async with serving() as (_, api):
        answer = await api.patch(table="mentors")

        assert (answer.status_code, code(answer)) == (404, "0x8006088a")
        assert answer.json()["error"]["message"] == "Resource not found for the segment 'mentors'."


@pytest.mark.parametrize("path", ["/api/data/v8.2/contacts", "/api/elsewhere", "/nowhere"])
async def test_a_path_outside_the_web_api_is_not_found(path: str) -> None:
    """
    Only v9.x of the Web API is there.
    """
    async with serving() as (_, api):
        answer = await api.http.patch(path, json=HIDE, headers=api.headers())

        assert (answer.status_code, code(answer)) == (404, "")


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", f"({ROW})"), ("DELETE", f"({ROW})"), ("POST", "")]
)
async def test_other_methods_are_not_served(method: str, path: str) -> None:
    """
    Nothing but PATCH of a row changes a table.
    """
    async with serving() as (sandbox, api):
        url = f"/api/data/v9.2/contacts{path}"

        answer = await api.http.request(method, url, json=HIDE, headers=api.headers())

        assert answer.status_code == 405
        assert visible(sandbox) is True


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["contacts", f"contacts({ROW})", f"contacts({ROW})?$select=a"])
async def test_reading_is_forbidden_and_recorded(method: str, path: str) -> None:
    """
    The role has no Read, and a test can prove that nobody tried.
    """
    async with serving() as (sandbox, api):
        answer = await api.http.request(method, f"/api/data/v9.2/{path}", headers=api.headers())

        assert answer.status_code == 403
        assert [entry.path for entry in reads(sandbox.ledger.entries)] == [f"/api/data/v9.2/{path}"]


@pytest.mark.parametrize(
    ("header", "error_code"),
    [(None, ""), ("Bearer", ""), ("Basic dTpw", ""), ("Bearer unknown", "0x8005F101")],
)
async def test_no_good_bearer_is_401_and_says_for_what(header: str | None, error_code: str) -> None:
    """
    A missing, unknown or other kind of credential is not authenticated.
    """
    async with serving() as (sandbox, api):
        answer = await api.patch(Authorization=header)

        assert (answer.status_code, code(answer)) == (401, error_code)
        assert answer.headers["WWW-Authenticate"] == f"Bearer resource_id={api.url}/"
        assert visible(sandbox) is True


async def test_a_token_dies_at_the_end_of_its_lifetime(clock: SteppedClock) -> None:
    """
    One second before it is good, at its end it is not.
    """
    async with serving(clock=clock, token_seconds=600) as (_, api):
        clock.now += 599
        assert (await api.patch()).status_code == 204
        clock.now += 1
        expired = await api.patch()

        assert (expired.status_code, code(expired)) == (401, "0x8005F101")


async def test_a_revoked_token_is_refused_and_a_new_one_is_not() -> None:
    """
    Revoking ends all tokens that were issued so far.
    """
    async with serving() as (sandbox, api):
        assert sandbox.revoke() == 1
        assert (await api.patch()).status_code == 401
        await api.log_in()

        assert (await api.patch()).status_code == 204


async def test_a_token_is_good_for_its_resource_only() -> None:
    """
    A token that was asked for another environment is refused here.
    """
    async with serving() as (_, api):
        answer = await api.ask_token(scope="https://other.crm4.dynamics.com/.default")
        api.token = answer.json()["access_token"]

        assert (await api.patch()).status_code == 401


async def test_an_audience_is_compared_without_case_and_trailing_slash() -> None:
    """
    A resource that was written with a slash at its end is the same environment.
    """
    async with serving() as (_, api):
        answer = await api.ask_token(scope=f"{api.url.replace('http', 'HTTP')}//.default")
        api.token = answer.json()["access_token"]

        assert (await api.patch()).status_code == 204


@pytest.mark.parametrize(
    ("privileges", "row", "missing"),
    [
        (Privileges(write=False), ROW, "prvWriteContact"),
        (Privileges(create=False), NO_ROW, "prvCreateContact"),
    ],
)
async def test_a_missing_privilege_is_403_and_named(
    privileges: Privileges, row: str, missing: str
) -> None:
    """
    The message names what the role lacks, as a person needs it to mend the role.
    """
    async with serving(privileges=privileges) as (_, api):
        answer = await api.patch(row, If_Match=None)

        assert (answer.status_code, code(answer)) == (403, "0x80040220")
        assert missing in answer.json()["error"]["message"]


async def test_a_body_beyond_the_bound_is_413_and_the_connection_lives() -> None:
    """
    A body of more than 1 MiB is thrown away, not kept.
    """
    async with serving() as (sandbox, api):
        large = {"hlf_portalvisible": "x" * 2**20}

        answers = [await api.patch(body=large), await api.ask_token(padding="x" * 2**20)]
        control = await api.http.put("/_sandbox/rows", json=large)

        assert [answer.status_code for answer in answers] == [413, 413]
        assert sandbox.ledger.entries[1].body is None
        assert control.status_code == 400
        assert (await api.patch()).status_code == 204


# The Custom API


async def test_the_custom_api_sets_the_column() -> None:
    """
    The action changes the same row and column as a PATCH.
    """
    async with serving() as (sandbox, api):
        answer = await api.act({"MentorId": ROW.upper(), "Visible": False})

        assert answer.status_code == 204
        assert values(sandbox.ledger.entries) == {ROW: [False]}


async def test_the_custom_api_invents_no_row_for_what_is_no_guid() -> None:
    """
    Also where any row is accepted, a wrong parameter leaves no trace.
    """
    async with serving(accept_any_row=True) as (sandbox, api):
        before = sandbox.rows

        assert (await api.act({"MentorId": "7", "Visible": False})).status_code == 400
        assert sandbox.rows == before


async def test_the_custom_api_also_knows_mentors_by_their_key() -> None:
    """
    Where mentors are known by an alternate key, MentorId may be its value.
    """
    rows = {"contacts": {ROW: {"hlf_portalvisible": True, "hlf_mentor": OTHER_ROW}}}
    async with serving(Sandbox(rows=rows, keys=["hlf_mentor"])) as (sandbox, api):
        answer = await api.act({"MentorId": OTHER_ROW, "Visible": False})

        assert answer.status_code == 204
        assert visible(sandbox) is False


@pytest.mark.parametrize(
    ("body", "status", "error_code"),
    [
        ({"MentorId": NO_ROW, "Visible": False}, 404, "0x80040217"),
        ({"MentorId": ROW}, 400, "0x80048d19"),
        ({"MentorId": ROW, "Visible": "false"}, 400, "0x80048d19"),
        ({"MentorId": "7", "Visible": False}, 400, "0x80048d19"),
        ({"MentorId": ROW, "Visible": False, "Why": "x"}, 400, "0x80048d19"),
        ([], 400, "0x80048d19"),
    ],
)
async def test_a_bad_call_of_the_custom_api_is_refused(
    body: object, status: int, error_code: str
) -> None:
    """
    Parameters are checked by name and type, and the row must be there.
    """
    async with serving() as (sandbox, api):
        before = sandbox.rows

        answer = await api.act(body)

        assert (answer.status_code, code(answer)) == (status, error_code)
        assert sandbox.rows == before


async def test_the_custom_api_needs_its_own_privilege_only() -> None:
    """
    Writing is not needed to execute it, and not enough.
    """
    call = {"MentorId": ROW, "Visible": False}
    async with serving(privileges=Privileges(write=False)) as (sandbox, api):
        allowed = await api.act(call)
        sandbox.adjust(privileges={"write": True, "execute": False})
        refused = await api.act(call)

        assert allowed.status_code == 204
        assert (refused.status_code, code(refused)) == (403, "0x80040220")


# $batch


def batch_body(*operations: str) -> bytes:
    """
    A batch of operations, each a request without its version line's end.
    """
    head = "--b\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n\r\n"
    return ("".join(f"{head}{operation}\r\n" for operation in operations) + "--b--\r\n").encode()


def operation(row: str, body: object = HIDE, *, target: str = "/api/data/v9.2/") -> str:
    """
    An update of one row, as a part of a batch.
    """
    lines = [
        f"PATCH {target}contacts({row}) HTTP/1.1",
        "Content-Type: application/json",
        "If-Match: *",
    ]
    return "\r\n".join([*lines, "", json.dumps(body)])


async def send_batch(api: Api, body: bytes, **headers: str | None) -> httpx.Response:
    """
    Post a batch.
    """
    usual = {"Content_Type": "multipart/mixed; boundary=b", "If_Match": None}
    given = api.headers(**(usual | headers))
    return await api.http.post("/api/data/v9.2/$batch", content=body, headers=given)


def part_statuses(answer: httpx.Response) -> list[str]:
    """
    The status of each answer in the answer to a batch.
    """
    return [line.split()[1] for line in answer.text.splitlines() if line.startswith("HTTP/1.1")]


async def test_a_batch_is_carried_out_in_order_and_answered_by_position() -> None:
    """
    With continue-on-error each operation has its own status, and none stops another.
    """
    async with serving() as (sandbox, api):
        body = batch_body(
            operation(ROW, target=""),
            operation(NO_ROW),
            operation(OTHER_ROW, target=f"{api.url}/api/data/v9.2/"),
        )

        answer = await send_batch(api, body, Prefer="odata.continue-on-error")

        assert answer.status_code == 200
        assert part_statuses(answer) == ["204", "404", "204"]
        assert values(sandbox.ledger.entries) == {ROW: [False], OTHER_ROW: [False]}


async def test_a_batch_stops_at_the_first_error_by_default() -> None:
    """
    The batch has the status of the operation that failed; those after it did not run.
    """
    async with serving() as (sandbox, api):
        body = batch_body(operation(ROW), operation(NO_ROW), operation(OTHER_ROW))

        answer = await send_batch(api, body)

        assert answer.status_code == 404
        assert part_statuses(answer) == ["204", "404"]
        assert visible(sandbox, OTHER_ROW) is True


async def test_operations_of_one_batch_do_not_overlap_each_other() -> None:
    """
    They share the number and the times of their batch, which is one request.
    """
    async with serving() as (sandbox, api):
        await send_batch(api, batch_body(operation(ROW), operation(ROW)))

        envelope, *parts = sandbox.ledger.entries[1:]

        assert [entry.kind for entry in (envelope, *parts)] == ["batch", "data", "data"]
        assert {entry.exchange for entry in parts} == {envelope.exchange}
        assert len(applied(sandbox.ledger.entries)) == 2
        assert overlaps(sandbox.ledger.entries) == []


async def test_one_operation_of_a_batch_may_fail_on_order() -> None:
    """
    An error that names a row hits the operation for it.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Status(status=500, key=OTHER_ROW))
        body = batch_body(operation(ROW), operation(OTHER_ROW))

        answer = await send_batch(api, body, Prefer="odata.continue-on-error")

        assert part_statuses(answer) == ["204", "500"]


async def test_the_reply_to_a_batch_may_be_lost() -> None:
    """
    All of it took effect.
    """
    async with serving() as (sandbox, api):
        sandbox.order(ResetAfter(target="data"))

        with pytest.raises(httpx.ReadError):
            await send_batch(api, batch_body(operation(ROW), operation(OTHER_ROW)))

        assert [visible(sandbox), visible(sandbox, OTHER_ROW)] == [False, False]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        batch_body(operation(ROW)).replace(b"binary\r\n\r\n", b"binary\n\n"),
        batch_body(*[operation(ROW)] * 1001),
        batch_body("nonsense"),
        batch_body("POST /api/data/v9.2/$batch HTTP/1.1\r\n\r\n"),
        batch_body(operation(ROW)).replace(b"application/http", b"multipart/mixed"),
    ],
    ids=["empty", "bare line ends", "too many", "no request", "nested", "change set"],
)
async def test_a_batch_that_cannot_be_read_is_refused_as_a_whole(body: bytes) -> None:
    """
    Nothing of it is carried out.
    """
    async with serving() as (sandbox, api):
        answer = await send_batch(api, body)

        assert answer.status_code == 400
        assert applied(sandbox.ledger.entries) == []


async def test_a_batch_needs_a_boundary_and_a_token() -> None:
    """
    The envelope is judged like any request.
    """
    async with serving() as (_, api):
        body = batch_body(operation(ROW))
        plain = await send_batch(api, body, Content_Type="application/json")
        stranger = await send_batch(api, body, Authorization=None)

        assert (plain.status_code, stranger.status_code) == (400, 401)


async def test_reading_within_a_batch_is_recorded() -> None:
    """
    No read hides in a batch.
    """
    async with serving() as (sandbox, api):
        await send_batch(api, batch_body("GET /api/data/v9.2/contacts?$top=1 HTTP/1.1\r\n\r\n"))

        assert [entry.status for entry in reads(sandbox.ledger.entries)] == [403]


# Service protection limits


async def test_too_many_requests_in_the_window_are_429(clock: SteppedClock) -> None:
    """
    The wait is until the first request leaves the window, and pushing on lengthens it.
    """
    async with serving(clock=clock, limits=Limits(requests=2)) as (_, api):
        for _step in range(2):
            assert (await api.patch()).status_code == 204
            clock.now += 10
        first, second = await api.patch(), await api.patch()

        assert (first.status_code, code(first)) == (429, "0x80072322")
        assert (first.headers["Retry-After"], second.headers["Retry-After"]) == ("290", "300")


async def test_the_window_slides(clock: SteppedClock) -> None:
    """
    Whoever waits as long as asked may go on.
    """
    async with serving(clock=clock, limits=Limits(requests=1)) as (_, api):
        await api.patch()
        limited = await api.patch()
        clock.now += int(limited.headers["Retry-After"])

        assert (await api.patch()).status_code == 204


async def test_limits_are_each_users_own(clock: SteppedClock) -> None:
    """
    One application does not use up what another may do.
    """
    async with serving(clock=clock, limits=Limits(requests=1)) as (sandbox, api):
        sandbox.register({"tenant": DEFAULT_TENANT, "client_id": "b", "client_secret": THEIRS})
        await api.patch()
        answer = await api.ask_token(client_id="b", client_secret=THEIRS)
        api.token = answer.json()["access_token"]

        assert (await api.patch()).status_code == 204


async def test_too_many_requests_at_once_are_429() -> None:
    """
    The second of two requests is refused at once while the first is under way.
    """
    async with serving(limits=Limits(concurrency=1)) as (sandbox, api):
        sandbox.order(Hang(target="data"))
        hanging = asyncio.create_task(api.patch())
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")

        refused = await api.patch()
        hanging.cancel()
        await sandbox.ledger.wait_finished(lambda entry: entry.fault == "hang")

        assert (refused.status_code, code(refused)) == (429, "0x80072326")
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await api.patch()).status_code == 204


async def test_too_much_execution_time_is_429(clock: SteppedClock) -> None:
    """
    The time that requests take is added up over the window.
    """
    async with serving(clock=clock, limits=Limits(execution_seconds=100)) as (sandbox, api):
        sandbox.order(Hang(target="data"))
        hanging = asyncio.create_task(api.patch())
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")
        clock.now += 101
        hanging.cancel()
        await sandbox.ledger.wait_finished(lambda entry: entry.fault == "hang")

        refused = await api.patch()
        clock.now += int(refused.headers["Retry-After"])

        assert (refused.status_code, code(refused)) == (429, "0x80072321")
        assert refused.headers["Retry-After"] == "300"
        assert (await api.patch()).status_code == 204


async def test_requests_without_a_known_token_count_for_nobody() -> None:
    """
    A 401 is a 401, however often.
    """
    async with serving(limits=Limits(requests=1)) as (_, api):
        statuses = [(await api.patch(Authorization=None)).status_code for _ in range(3)]

        assert statuses == [401, 401, 401]

"""
The sandbox over real sockets: every fault, and what the ledger says of it.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.sandbox_api import (
    HIDE,
    NO_ROW,
    OTHER_ROW,
    ROW,
    code,
    raw_patch,
    serving,
    visible,
)
from worker.dynamics.sandbox import (
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_TENANT,
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    Late,
    Oversized,
    ResetAfter,
    ResetBefore,
    Slow,
    Status,
    Truncated,
    fingerprint,
    overlaps,
    peak,
    read_ledger,
    values,
)

if TYPE_CHECKING:
    from pathlib import Path


# Faults


async def test_a_fault_hits_as_often_as_ordered() -> None:
    """
    After `times` requests everything is well again.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Status(status=503, times=2))

        statuses = [(await api.patch()).status_code for _ in range(3)]

        assert statuses == [503, 503, 204]
        assert not sandbox.faults


async def test_a_fault_without_end_hits_until_it_is_called_off() -> None:
    """
    Calling one off leaves the others standing.
    """
    async with serving() as (sandbox, api):
        first = sandbox.order(Status(status=503, times=None))
        sandbox.order(Status(status=500, times=None))

        assert (await api.patch()).status_code == 503
        assert sandbox.call_off(first) == 1
        assert (await api.patch()).status_code == 500
        assert sandbox.call_off() == 1
        assert (await api.patch()).status_code == 204


@pytest.mark.parametrize(
    ("where", "hit"),
    [
        ({"target": "token"}, "token"),
        ({"target": "data", "key": ROW.upper()}, "patch"),
        ({"key": OTHER_ROW}, "other row"),
        ({"method": "post", "target": "data"}, "action"),
        ({"target": "any", "method": "PATCH", "key": OTHER_ROW}, "other row"),
    ],
)
async def test_a_fault_hits_only_what_it_names(where: dict[str, Any], hit: str) -> None:
    """
    Target, row and method all have to fit.
    """
    async with serving() as (sandbox, api):
        sandbox.order({"what": "status", "status": 500, "times": None, **where})

        answers = {
            "token": await api.ask_token(),
            "patch": await api.patch(),
            "other row": await api.patch(OTHER_ROW),
            "action": await api.act({"MentorId": ROW, "Visible": False}),
        }

        if "key" in where and where["key"] == ROW.upper():
            answers.pop("action")  # the action is for that row too
        assert [name for name, answer in answers.items() if answer.status_code == 500] == [hit]


async def test_a_fault_finds_a_row_by_the_value_of_its_alternate_key() -> None:
    """
    Who knows the mentor id only can order a fault for it.
    """
    async with serving(keys=["hlf_no"], accept_any_row=True) as (sandbox, api):
        sandbox.order(Status(status=500, key="Seven"))

        assert (await api.patch("hlf_no='six'")).status_code == 204
        assert (await api.patch("hlf_no='seven'")).status_code == 500


@pytest.mark.parametrize(
    "retry_after", [None, "7", "-1", "soon", "Fri, 31 Dec 1999 23:59:59 GMT", ""]
)
async def test_retry_after_is_sent_literally(retry_after: str | None) -> None:
    """
    Seconds, a date, a negative number, nonsense or nothing at all.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Status(status=429, retry_after=retry_after))

        answer = await api.patch()

        assert answer.headers.get("Retry-After") == retry_after
        assert code(answer) == "0x80072322"


async def test_an_ordered_error_speaks_the_dialect_of_its_endpoint() -> None:
    """
    A code can be chosen, also none; at the token endpoint the shape is Entra's.
    """
    async with serving() as (sandbox, api):
        for fault in (
            Status(target="data", status=404, code=""),
            Status(target="data", status=500, code="0x80044150"),
            Status(target="token", status=503),
            Status(target="token", status=401),
        ):
            sandbox.order(fault)

        answers = [
            await api.patch(),
            await api.patch(),
            await api.ask_token(),
            await api.ask_token(),
        ]

        assert [code(answer) for answer in answers[:2]] == ["", "0x80044150"]
        words = [answer.json()["error"] for answer in answers[2:]]
        assert words == ["temporarily_unavailable", "invalid_client"]


async def test_an_error_may_hide_a_change_that_took_effect() -> None:
    """
    A gateway's 504 does not say what happened behind it.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Status(target="data", status=504, applied=True))

        assert (await api.patch()).status_code == 504
        assert visible(sandbox) is False


async def test_an_ordered_delay_comes_before_the_fault() -> None:
    """
    Nothing has happened until the delay is over.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Status(target="data", status=504, applied=True, seconds=3600))
        waiting = asyncio.create_task(api.patch())
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")

        assert visible(sandbox) is True
        waiting.cancel()


async def test_slow_may_apply_first_and_answer_later() -> None:
    """
    A client that gives up has changed the row.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Slow(target="data", seconds=3600))
        waiting = asyncio.create_task(api.patch())
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data" and entry.applied)
        waiting.cancel()
        entry = await sandbox.ledger.wait_finished(lambda entry: entry.fault == "slow")

        assert visible(sandbox) is False
        assert entry.status is None


async def test_slow_without_applying_does_nothing_for_a_client_that_left() -> None:
    """
    A client that gives up has changed nothing, and its request ends when it leaves.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Slow(target="data", seconds=3600, applied=False))
        waiting = asyncio.create_task(api.patch())
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")
        waiting.cancel()
        entry = await sandbox.ledger.wait_finished(lambda entry: entry.fault == "slow")

        assert not entry.applied
        assert visible(sandbox) is True


@pytest.mark.parametrize("applied_first", [True, False])
async def test_slow_answers_rightly_in_the_end(applied_first: bool) -> None:  # noqa: FBT001
    """
    A patient client gets its 204.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Slow(target="data", seconds=0.01, applied=applied_first))

        assert (await api.patch()).status_code == 204
        assert visible(sandbox) is False


async def test_drip_answers_byte_by_byte() -> None:
    """
    The whole answer arrives, and it is right.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Drip(target="data", seconds=0.0001))

        assert (await api.patch()).status_code == 204


async def test_drip_is_under_way_until_its_last_byte() -> None:
    """
    A timeout per read does not save a client from it; leaving does.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Drip(target="data", seconds=3600))
        reader, writer = await raw_patch(api)

        assert await reader.read(100) == b"H"
        assert [entry.kind for entry in sandbox.ledger.in_progress] == ["data"]
        writer.close()
        entry = await sandbox.ledger.wait_finished(lambda entry: entry.fault == "drip")
        assert (entry.status, entry.applied) == (None, True)


@pytest.mark.parametrize(
    ("fault", "took_effect"),
    [(ResetBefore(target="data"), False), (ResetAfter(target="data"), True)],
)
async def test_a_reset_is_a_reset_and_the_ledger_knows_what_it_hides(
    fault: Fault,
    took_effect: bool,  # noqa: FBT001
) -> None:
    """
    The client sees RST in both cases and cannot tell them apart.
    """
    async with serving() as (sandbox, api):
        sandbox.order(fault)
        reader, writer = await raw_patch(api)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()

        entry = sandbox.ledger.entries[-1]
        assert (entry.applied, entry.status) == (took_effect, None)
        assert visible(sandbox) is not took_effect


async def test_a_late_request_lands_after_the_client_has_left_and_moved_on() -> None:
    """
    The older value wins although the newer one was sent after it: the ledger shows both.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Late(target="data", seconds=0.2))
        old = asyncio.create_task(api.patch(body={"hlf_portalvisible": False}))
        await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")
        old.cancel()
        await asyncio.gather(old, return_exceptions=True)
        await api.patch(body={"hlf_portalvisible": True})
        late = await sandbox.ledger.wait_finished(lambda entry: entry.fault == "late")

        assert values(sandbox.ledger.entries) == {ROW: [True, False]}
        assert late is sandbox.ledger.entries[-1]
        assert late.finished_at is not None
        assert late.applied_at is not None
        assert late.finished_at < late.applied_at
        assert overlaps(sandbox.ledger.entries) == []


async def test_a_late_request_is_never_answered() -> None:
    """
    A client that waits loses its connection when the change lands.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Late(target="data", seconds=0.01))

        with pytest.raises(httpx.RemoteProtocolError):
            await api.patch()

        assert visible(sandbox) is False


@pytest.mark.parametrize("took_effect", [True, False])
async def test_hang_never_answers(took_effect: bool) -> None:  # noqa: FBT001
    """
    The request is under way until the client leaves, whatever has happened.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Hang(target="data", applied=took_effect))
        with pytest.raises(httpx.ReadTimeout):
            await api.http.patch(
                f"/api/data/v9.2/contacts({ROW})", json=HIDE, headers=api.headers(), timeout=0.05
            )
        entry = await sandbox.ledger.wait_finished(lambda entry: entry.fault == "hang")

        assert (entry.status, entry.applied) == (None, took_effect)


@pytest.mark.parametrize("fault", [Garbage(), Truncated()])
async def test_a_broken_answer_is_a_protocol_error(fault: Fault) -> None:
    """
    Bytes that are no HTTP, and a body that ends too early.
    """
    async with serving() as (sandbox, api):
        sandbox.order(fault)

        with pytest.raises(httpx.RemoteProtocolError):
            await api.patch()
        assert (await api.patch()).status_code == 204


async def test_a_truncated_error_keeps_its_own_body() -> None:
    """
    An answer that has a body is cut short itself.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Truncated())

        with pytest.raises(httpx.RemoteProtocolError):
            await api.patch(NO_ROW)
        assert sandbox.ledger.entries[-1].status == 404


async def test_a_page_may_come_instead_of_an_answer() -> None:
    """
    200 is not success when it is a web page.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Html())
        sandbox.order(Html(status=502))

        page, gateway = await api.patch(), await api.patch()

        assert (page.status_code, gateway.status_code) == (200, 502)
        assert page.headers["Content-Type"].startswith("text/html")
        assert visible(sandbox) is True


async def test_an_answer_may_be_enormous() -> None:
    """
    Ten megabytes arrive whole, if the client wants them.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Oversized())

        answer = await api.patch()

        assert len(answer.content) == 10_000_000
        assert answer.json()["value"].startswith("xxx")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_leads_where_it_was_ordered(status: int) -> None:
    """
    A client that follows would carry its token there.
    """
    async with serving() as (sandbox, api):
        sandbox.order({"what": "redirect", "status": status, "location": "http://127.0.0.2/"})

        answer = await api.patch()

        assert (answer.status_code, answer.headers["Location"]) == (status, "http://127.0.0.2/")


async def test_an_expired_token_is_401_until_it_is_renewed() -> None:
    """
    The token is dead for good, not for one request.
    """
    async with serving() as (sandbox, api):
        sandbox.order(ExpireToken())

        assert [(await api.patch()).status_code for _ in range(2)] == [401, 401]
        await api.log_in()
        assert (await api.patch()).status_code == 204


async def test_a_token_may_be_issued_and_lost() -> None:
    """
    Faults work at the token endpoint too.
    """
    async with serving() as (sandbox, api):
        sandbox.order(ResetAfter(target="token"))

        with pytest.raises(httpx.ReadError):
            await api.ask_token()

        assert sandbox.ledger.entries[-1].applied
        assert sandbox.revoke() == 2


# The ledger


async def test_the_ledger_tells_what_was_asked_and_what_came_of_it() -> None:
    """
    One entry per request, with the ids that a client sends along.
    """
    async with serving() as (sandbox, api):
        await api.patch(x_ms_correlation_id="event-1", x_ms_client_request_id="attempt-1")

        token, patch = sandbox.ledger.entries

        assert (token.kind, token.client_id, token.status) == ("token", DEFAULT_CLIENT_ID, 200)
        assert (patch.correlation_id, patch.client_request_id) == ("event-1", "attempt-1")
        assert (patch.entity_set, patch.key, patch.row) == ("contacts", ROW, ROW)
        assert (patch.body, patch.if_match, patch.status) == (HIDE, "*", 204)
        assert patch.token == token.token == fingerprint(api.token)
        assert patch.finished_at is not None
        assert patch.applied_at is not None
        assert patch.started_at <= patch.applied_at <= patch.finished_at


async def test_no_secret_is_ever_in_the_ledger(tmp_path: Path) -> None:
    """
    Neither the client secret nor a token, wherever a client may have put them.
    """
    path = tmp_path / "ledger.jsonl"
    async with serving(ledger_path=path) as (sandbox, api):
        url = f"/{DEFAULT_TENANT}/oauth2/v2.0/token?client_secret={DEFAULT_CLIENT_SECRET}"
        await api.http.post(url, content=b"")
        basic = httpx.BasicAuth(DEFAULT_CLIENT_ID, DEFAULT_CLIENT_SECRET)
        await api.http.post(url, data={"grant_type": "client_credentials"}, auth=basic)
        await api.patch()
        seen = path.read_text() + json.dumps([e.to_json() for e in sandbox.ledger.entries])

        assert DEFAULT_CLIENT_SECRET not in seen
        assert api.token not in seen
        assert len(read_ledger(path)) == 4


async def test_the_file_has_every_entry_at_once(tmp_path: Path) -> None:
    """
    A client that holds an answer finds its line in the file, and it reads back the same.
    """
    path = tmp_path / "ledger.jsonl"
    async with serving(ledger_path=path) as (sandbox, api):
        await api.patch()

        assert read_ledger(path) == list(sandbox.ledger.entries)


async def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    """
    Reading beside a writer is safe.
    """
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"seq": 1}\n{"seq": 2')

    assert [entry.seq for entry in read_ledger(path)] == [1]


async def test_requests_one_after_the_other_never_overlap() -> None:
    """
    An entry ends before its answer leaves, so a quick client is not accused.
    """
    async with serving() as (sandbox, api):
        for _ in range(50):
            await api.patch()

        assert overlaps(sandbox.ledger.entries) == []
        assert peak(sandbox.ledger.entries) == 1


async def test_requests_for_one_row_at_once_are_found() -> None:
    """
    Two ways of addressing one row are one row.
    """
    async with serving() as (sandbox, api):
        sandbox.order(Hang(target="data"))
        hanging = asyncio.create_task(api.patch())
        first = await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")
        await api.act({"MentorId": ROW, "Visible": True})
        await api.patch(OTHER_ROW)
        hanging.cancel()
        await sandbox.ledger.wait_finished(lambda entry: entry.fault == "hang")

        pairs = overlaps(sandbox.ledger.entries)

        assert [(one.exchange, other.method) for one, other in pairs] == [(first.exchange, "POST")]


async def test_latency_delays_every_answer_and_ends_in_the_change() -> None:
    """
    The change is applied at the end of it, also for a client that left.
    """
    async with serving() as (sandbox, api):
        sandbox.adjust(latency_seconds=0.05)
        task = asyncio.create_task(api.patch())
        entry = await sandbox.ledger.wait_for(lambda entry: entry.kind == "data")
        task.cancel()

        assert not entry.applied
        await sandbox.ledger.wait_finished(lambda entry: entry.kind == "data")
        assert entry.applied
        assert entry.status is None

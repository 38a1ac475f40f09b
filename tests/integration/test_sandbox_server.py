"""
The sandbox over real sockets: its control endpoints, its server and its process.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import ssl
import sys
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme
from typing_extensions import override

from tests.integration.sandbox_api import (
    NO_ROW,
    NO_TRUST,
    OTHER_ROW,
    ROW,
    Api,
    raw_patch,
    serving,
    two_rows,
    visible,
)
from worker.dynamics.sandbox import (
    Entry,
    Hang,
    Late,
    Limits,
    Options,
    ResetAfter,
    Sandbox,
    SandboxError,
    announcement,
    peak,
    run,
)

if TYPE_CHECKING:
    from pathlib import Path


HUSH = "a secret that is not printed"

# Control


async def test_everything_can_be_ordered_over_http() -> None:
    """
    The control endpoints do what the methods do.
    """
    async with serving() as (sandbox, api):
        http = api.http
        rows = {"contacts": {NO_ROW: {"hlf_portalvisible": True, "hlf_no": "7"}}}
        registration = {"tenant": "t", "client_id": "c", "client_secret": "s"}

        assert (await http.put("/_sandbox/rows", json=rows)).json() == {"contacts": 1}
        assert (await http.get("/_sandbox/rows")).json() == rows
        keys = {"contacts": ["hlf_no"]}
        assert (await http.post("/_sandbox/keys", json=keys)).json() == keys
        assert (await api.patch("hlf_no='7'")).status_code == 204
        order = {"what": "late", "seconds": 5, "times": None}
        assert (await http.post("/_sandbox/faults", json=order)).json() == {"id": 1}
        standing = (await http.get("/_sandbox/faults")).json()["faults"][0]
        assert standing.items() >= {"id": 1, "used": 0, "left": None, "what": "late"}.items()
        assert (await http.delete("/_sandbox/faults?id=9")).json() == {"removed": 0}
        assert (await http.delete("/_sandbox/faults")).json() == {"removed": 1}
        registered = await http.post("/_sandbox/registrations", json=registration)
        assert registered.json() == {"tenant": "t", "client_id": "c", "hosts": []}
        changed = await http.post("/_sandbox/settings", json={"limits": {"requests": 5}})
        assert changed.json() == (await http.get("/_sandbox/settings")).json()
        assert sandbox.settings.limits == Limits(requests=5)
        assert (await http.post("/_sandbox/revoke")).json() == {"revoked": 1}


async def test_the_ledger_can_be_followed_over_http() -> None:
    """
    `since` gives what is new; control requests are not in it.
    """
    async with serving() as (sandbox, api):
        await api.patch()
        sandbox.order(Hang(target="data"))
        hanging = asyncio.create_task(api.patch(OTHER_ROW))
        await sandbox.ledger.wait_for(lambda entry: entry.row == OTHER_ROW)

        followed = (await api.http.get("/_sandbox/ledger?since=1")).json()
        health = (await api.http.get("/_sandbox/health")).json()
        hanging.cancel()

        assert [entry["seq"] for entry in followed["entries"]] == [2]
        assert [entry["row"] for entry in followed["in_progress"]] == [OTHER_ROW]
        expected = {
            "ok": True,
            "entries": 2,
            "in_progress": 1,
            "faults": 0,
            "rows": {"contacts": 2},
        }
        assert health == expected


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "faults", {"what": "earthquake"}, "'earthquake'"),
        ("POST", "faults", {"what": "status"}, "'status.status'"),
        ("POST", "faults", {"what": "status", "status": 200}, "greater than or equal to 400"),
        ("POST", "faults", {"what": "hang", "times": 0}, "'hang.times'"),
        ("POST", "faults", {"what": "hang", "typo": 1}, "'hang.typo'"),
        ("POST", "faults", {"what": "late"}, "'late.seconds'"),
        ("POST", "faults", [], "object"),
        ("PUT", "rows", {"contacts": {"1": {}}}, "'1' is no GUID"),
        ("PUT", "rows", {"contacts": {ROW: {"a": None}}}, "'a' is neither"),
        ("PUT", "rows", {"contacts": []}, "'contacts'"),
        ("POST", "keys", {"contacts": "a"}, "'contacts'"),
        ("POST", "registrations", {"tenant": "a/b"}, "'tenant'"),
        ("POST", "settings", {"latency": 1}, "'latency'"),
        ("POST", "settings", {"limits": {"requests": 0}}, "'limits.requests'"),
        ("GET", "ledger?since=last", None, "whole number"),
        ("DELETE", "faults?id=-1", None, "whole number"),
    ],
)
async def test_bad_input_is_one_clear_sentence(
    method: str, path: str, body: object, words: str
) -> None:
    """
    It says where and what, and changes nothing.
    """
    async with serving() as (sandbox, api):
        before = (sandbox.rows, sandbox.settings, len(sandbox.faults))

        answer = await api.http.request(method, f"/_sandbox/{path}", json=body)

        assert answer.status_code == 400
        assert words in answer.json()["error"]
        assert answer.json()["error"].endswith(".")
        assert "\n" not in answer.json()["error"]
        assert (sandbox.rows, sandbox.settings, len(sandbox.faults)) == before


async def test_unknown_control_requests_are_told_so() -> None:
    """
    404 for an unknown path, 405 for a wrong method.
    """
    async with serving() as (_, api):
        assert (await api.http.get("/_sandbox/nothing")).status_code == 404
        assert (await api.http.post("/_sandbox/health")).status_code == 405


# The server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])  # noqa: S104
async def test_only_loopback_is_served(host: str) -> None:
    """
    The sandbox hands out tokens, so nobody else may reach it.
    """
    with pytest.raises(SandboxError, match="loopback only"):
        async with Sandbox().serve(host=host):
            pass


async def test_a_taken_port_is_one_sentence() -> None:
    """
    No traceback of sockets.
    """
    async with Sandbox().serve() as running:
        port = int(running.url.rpartition(":")[2])

        with pytest.raises(SandboxError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with Sandbox().serve(port=port):
                pass


@pytest.mark.parametrize("host", ["localhost", "::1"])
async def test_other_names_of_loopback_work(host: str) -> None:
    """
    The URL that is given can be used.
    """
    try:
        async with (
            Sandbox().serve(host=host) as running,
            httpx.AsyncClient(verify=NO_TRUST) as http,
        ):
            assert (await http.get(f"{running.url}/_sandbox/health")).status_code == 200
    except SandboxError as error:
        if host == "::1":
            pytest.skip(f"No IPv6 here: {error}")
        raise


async def test_a_connection_is_kept_for_the_next_request() -> None:
    """
    HTTP keep-alive: many requests, one connection, also when they are sent in one go.
    """
    async with serving() as (sandbox, api):
        reader, writer = await raw_patch(api)
        request = b"GET /_sandbox/health HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request + request)
        first = await reader.readuntil(b"\r\n")
        for _ in range(2):
            await reader.readuntil(b'"ok": true')
        writer.close()

        assert first.startswith(b"HTTP/1.1 204 ")
        assert visible(sandbox) is False


async def test_what_is_no_http_is_refused() -> None:
    """
    A 400 and the end of the connection.
    """
    async with Sandbox().serve() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.split(":")[2]))
        writer.write(b"this is no HTTP\r\n\r\n")

        answer = await reader.read()
        writer.close()

        assert answer.startswith(b"HTTP/1.1 400 ")


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    """
    Expect: 100-continue is honoured.
    """
    async with Sandbox().serve() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.split(":")[2]))
        head = b"PUT /_sandbox/rows HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
        writer.write(head + b"Expect: 100-continue\r\n\r\n")
        interim = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"{}")
        final = await reader.readuntil(b"\r\n")
        writer.close()

        assert interim.startswith(b"HTTP/1.1 100")
        assert final.startswith(b"HTTP/1.1 200")


async def test_a_bug_of_the_sandbox_is_logged_and_not_hidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The client sees a reset, the log has the traceback, and the next request works.
    """
    async with serving() as (sandbox, api):
        with monkeypatch.context() as patched:
            patched.setattr(sandbox, "_receive", None)
            with pytest.raises(httpx.ReadError):
                await api.patch()

        assert "The sandbox itself failed" in caplog.text
        assert (await api.patch()).status_code == 204


async def test_it_stops_with_clients_connected_and_requests_under_way() -> None:
    """
    Nothing is left running; a late change that has not landed never does.
    """
    sandbox = Sandbox(rows=two_rows())
    async with serving(sandbox) as (_, api):
        sandbox.order(Late(target="data", seconds=3600, key=ROW))
        sandbox.order(Hang(target="data", key=OTHER_ROW))
        requests = [asyncio.create_task(api.patch(row)) for row in (ROW, OTHER_ROW)]
        for row in (ROW, OTHER_ROW):
            await sandbox.ledger.wait_for(functools.partial(is_for, row))
        _, idle = await asyncio.open_connection("127.0.0.1", int(api.url.split(":")[2]))
        sandbox_is_left = asyncio.get_running_loop().time()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    idle.close()

    assert all(isinstance(outcome, (httpx.HTTPError, RuntimeError)) for outcome in outcomes)
    assert asyncio.get_running_loop().time() - sandbox_is_left < 5
    assert visible(sandbox) is True
    assert asyncio.all_tasks() == {asyncio.current_task()}


def is_for(row: str, entry: Entry) -> bool:
    """
    Whether a request is for a row.
    """
    return entry.row == row


async def test_it_serves_hundreds_of_connections_at_once() -> None:
    """
    300 clients with requests under way are 300 requests at the peak.
    """
    options = Options(accept_any_row=True, limits=Limits.none(), latency_seconds=0.3)
    sandbox = Sandbox(accept_any_row=options.accept_any_row, limits=options.limits)
    async with serving(sandbox) as (_, api):
        sandbox.adjust(latency_seconds=options.latency_seconds)
        streams = await asyncio.gather(*(raw_patch(api) for _ in range(300)))
        answers = await asyncio.gather(*(reader.readuntil(b"\r\n") for reader, _ in streams))
        for _, writer in streams:
            writer.close()

    assert {answer[9:12] for answer in answers} == {b"204"}
    assert peak(sandbox.ledger.entries) == 300


async def test_it_speaks_tls_and_resets_under_it() -> None:
    """
    Faults are the same under TLS, and so is stopping.
    """
    authority = trustme.CA()
    server, client = (
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
        ssl.create_default_context(),
    )
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    sandbox = Sandbox(rows=two_rows())
    async with (
        sandbox.serve(ssl_context=server) as running,
        httpx.AsyncClient(base_url=running.url, verify=client) as http,
    ):
        api = await Api(http, running.url).log_in()
        sandbox.order(ResetAfter(target="data"))
        with pytest.raises(httpx.ReadError):
            await api.patch()

        assert running.url.startswith("https://")
        assert visible(sandbox) is False
        assert (await api.patch()).status_code == 204


async def test_it_stops_while_a_tls_handshake_never_ends() -> None:
    """
    A client that connects and says nothing does not keep it.
    """
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(server)
    async with Sandbox().serve(ssl_context=server) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", int(running.url.split(":")[2]))
        async with httpx.AsyncClient(verify=False) as http:  # noqa: S501 - pretended
            await http.get(f"{running.url}/_sandbox/health")
    writer.close()
    await writer.wait_closed()


async def test_the_process_announces_itself_and_serves_until_cancelled(tmp_path: Path) -> None:
    """
    One line of JSON without secrets, then requests, then a clean end.
    """
    options = Options(ledger_path=tmp_path / "l.jsonl", key="hlf_no", client_secret=HUSH)
    line: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(options, announce=line.set_result))
    said = json.loads(await line)
    async with httpx.AsyncClient(base_url=said["listening"], verify=NO_TRUST) as http:
        api = Api(http, said["listening"])
        granted = await api.ask_token(client_secret=HUSH)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert granted.status_code == 200
    assert said == json.loads(announcement(options, url=said["listening"]))
    assert HUSH not in json.dumps(said)
    assert said["control"] == f"{said['listening']}/_sandbox/"


async def test_the_announcement_goes_to_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Without a listener of its own, a line of the process says where the sandbox is.
    """
    said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Ear(said))
        task = asyncio.create_task(run(Options()))
        line = await said
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert line.endswith("}\n")
    assert json.loads(line)["listening"].startswith("http://127.0.0.1:")


class Ear(io.StringIO):
    """
    A standard output that tells what is written to it.
    """

    def __init__(self, heard: asyncio.Future[str]) -> None:
        super().__init__()
        self._heard = heard

    @override
    def flush(self) -> None:
        if self.getvalue() and not self._heard.done():
            self._heard.set_result(self.getvalue())

"""
A worker as its surroundings see it: its port, its logs, and what neither of them tells.
"""

from __future__ import annotations

import gzip
import json
import signal
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import make_url
from typing_extensions import override

from tests import canaries
from tests.chaos.proxy import Refuse, listening
from tests.chaos.server import free_port
from tests.conftest import until
from worker.dynamics.sandbox import Slow, Status

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from tests.acceptance.site import Run, Site

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Outside:
    """
    Whoever watches a worker.
    """

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    async def get(self, path: str) -> httpx.Response | None:
        """
        The answer, or None if nobody is there.
        """
        async with httpx.AsyncClient(timeout=5) as client:
            try:
                return await client.get(f"{self._url}{path}")
            except httpx.TransportError:
                return None

    async def is_ready(self) -> bool:
        """
        Whether the worker says that it is.
        """
        answer = await self.get("/ready")
        return answer is not None and answer.status_code == 200

    async def is_unready(self) -> bool:
        """
        Whether it says that it is not.
        """
        answer = await self.get("/ready")
        return answer is not None and answer.status_code == 503

    async def metrics(self) -> Series:
        """
        What it tells, by name and labels.
        """
        answer = await self.get("/metrics")
        assert answer is not None
        return {
            (one.name, frozenset(one.labels.items())): one.value
            for family in text_string_to_metric_families(answer.text)
            for one in family.samples
        }


def counted(series: Series, organization_id: UUID) -> Mapping[str, float]:
    """
    How many attempts ended how, towards Dynamics.
    """
    where = {"organization_id": str(organization_id), "destination": "dynamics"}
    return {
        dict(labels)["outcome"]: number
        for (name, labels), number in series.items()
        if name == "hlf_sync_attempts_total" and where.items() <= dict(labels).items() and number
    }


def logged(run: Run) -> list[dict[str, Any]]:
    """
    Every line of a log is a document.
    """
    return [json.loads(line) for line in run.stderr.splitlines()]


async def test_a_worker_tells_what_it_did_and_no_secret(site: Site) -> None:
    """
    One delivered, one tried again and delivered, one given up: exactly that is counted; each
    line of the log about one of them says which, and no canary is anywhere. Told to stop, it
    is not ready and still lives.
    """
    outside = Outside(port := free_port())
    good, gone, late = [await site.world.mentor() for _ in range(3)]
    site.link([good, late])
    site.sandbox.order(Status(status=503, times=1, target="data"))
    await site.world.certifications.expire(good.certification_id)
    worker = await site.start_worker(HLF_METRICS_PORT=str(port), HLF_LOG_FORMAT="json")
    await until(outside.is_ready)
    await site.confirmed(good)
    await site.world.certifications.expire(gone.certification_id)

    async def told() -> bool:
        return counted(await outside.metrics(), site.world.hlf) == {
            "delivered": 1,
            "retry": 1,
            "dead": 1,
        }

    await until(told)
    answer = await outside.get("/metrics")
    assert answer is not None
    names = {str(good.id), str(gone.id), str(good.dynamics_id), "A mentor"}
    assert [name for name in names if name in answer.text] == []
    assert canaries.found(answer.text) == []

    site.sandbox.order(Slow(seconds=2, target="data"))
    await site.world.certifications.expire(late.certification_id)
    await until(site.in_flight)
    worker.send_signal(signal.SIGTERM)
    await until(outside.is_unready)
    live = await outside.get("/live")
    assert live is not None
    assert live.status_code == 200

    [run] = await site.end()
    lines = logged(run)
    assert {line["organization_id"] for line in lines} == {str(site.world.hlf)}
    failed = [line for line in lines if line["event"] in FAILURES]
    assert [line["mentor_id"] for line in failed] == [
        str(one.id) for one in (good, good, gone, gone)
    ]
    for line in failed:
        assert line.keys() >= {"event_id", "attempt", "worker_id"}
        assert line["destination"] == "dynamics"


FAILURES = {"outbox.attempt_failed", "request.refused"}
"""Lines of the log about one attempt."""


async def test_a_worker_without_its_database_lives_and_is_not_ready(
    site: Site, database_url: str
) -> None:
    """
    Until the line is mended; its metrics say that the database is away.
    """
    outside = Outside(port := free_port())
    url = make_url(database_url)
    async with listening(url.host or str(url.query.get("host")), url.port or 5432) as proxy:
        near = url.set(host="127.0.0.1", port=proxy.port, query={})
        await site.start_worker(
            HLF_METRICS_PORT=str(port),
            HLF_SYNC_REQUEST_SECONDS="1",
            DATABASE_URL=near.render_as_string(hide_password=False),
        )
        await until(outside.is_ready)
        proxy.order(Refuse())
        proxy.cut()

        await until(outside.is_unready, seconds=30)
        live = await outside.get("/live")
        assert live is not None
        assert live.status_code == 200
        up = ("hlf_sync_database_up", frozenset({("organization_id", str(site.world.hlf))}))

        async def said() -> bool:
            return (await outside.metrics())[up] == 0

        await until(said)

        proxy.heal()
        await until(outside.is_ready, seconds=30)
        await site.end()


async def test_a_port_that_is_taken_is_one_sentence(site: Site) -> None:
    """
    Before anything is claimed.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = await site.run("worker", HLF_METRICS_PORT=str(port))

    assert run.code == 78
    assert run.stderr.startswith("Error: HLF_METRICS_HOST and HLF_METRICS_PORT: cannot listen")
    assert run.stderr.count("\n") == 1


class Collector:
    """
    Takes whatever is posted, on loopback, in a thread of its own.
    """

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        posts = self.posts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                posts.append((self.path, dict(self.headers), body))
                self.send_response(200)
                self.end_headers()

            @override
            def log_message(self, format: str, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


async def test_traces_are_sent_as_they_are_asked_for_and_hold_no_secret(site: Site) -> None:
    """
    By OpenTelemetry's own variables, to a collector with a header; the attempt that succeeded and
    the one that did not.
    """
    good, gone = await site.world.mentor(), await site.world.mentor()
    site.link([good])
    for mentor in (good, gone):
        await site.world.certifications.expire(mentor.certification_id)
    with Collector() as collector:
        run = await site.run(
            "drain",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.port}",
            OTEL_EXPORTER_OTLP_HEADERS="api-key=canary-otlp",
            OTEL_SERVICE_NAME="mentors",
        )

    assert run.code == 3, run.stderr
    assert collector.posts
    sent = b"".join(body for _, _, body in collector.posts)
    for path, headers, _ in collector.posts:
        assert path == "/v1/traces"
        assert headers["api-key"] == "canary-otlp"
    assert sent.count(b"hlf_sync.attempt") >= 2
    assert b"mentors" in sent
    assert canaries.found(sent.decode(errors="replace")) == []


async def test_an_error_that_nobody_expected_is_reported_without_what_it_holds(site: Site) -> None:
    """
    A table is gone beneath a command: one sentence, one line in the log with the place, and one
    envelope that says as much; no text of the database's, no variable, no canary.
    """
    await site.world.execute("ALTER TABLE outbox.gates RENAME TO gone")
    try:
        with Collector() as collector:
            run = await site.run(
                "status",
                HLF_LOG_FORMAT="json",
                SENTRY_DSN=f"http://canary-key@127.0.0.1:{collector.port}/1",
                SENTRY_ENVIRONMENT="test",
            )
    finally:
        await site.world.execute("ALTER TABLE outbox.gone RENAME TO gates")

    assert run.code == 1
    line, sentence = run.stderr.splitlines()
    assert sentence == "Error: Something unexpected happened (ProgrammingError); the log has more."
    told = json.loads(line)
    assert told["event"] == "command.failed"
    assert told["exception"]["sqlstate"] == "42P01"
    [(path, _, body)] = collector.posts
    assert path == "/api/1/envelope/"
    envelope = gzip.decompress(body).decode()
    *_, document = (json.loads(part) for part in envelope.splitlines())
    assert (document["message"], document["environment"]) == ("command.failed", "test")
    assert document["tags"]["organization_id"] == str(site.world.hlf)
    error = document["exception"]["values"][-1]
    assert (error["type"], error["value"]) == ("ProgrammingError", "42P01")
    assert error["stacktrace"]["frames"][-1].keys() == {"module", "function", "lineno"}
    for hidden in ("SELECT", "does not exist"):
        assert hidden not in envelope
        assert hidden not in run.stderr
    assert canaries.found(envelope) == []

"""
Live pages over real sockets: what changes comes to all who watch, and to nobody else.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from tests.conftest import until
from tests.desk import Desk
from tests.served import served
from worker.coordinator import stream
from worker.coordinator.app import Dashboard, create_app
from worker.coordinator.callers import Caller
from worker.wakeup import notify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import HTTPConnection
    from starlette.routing import BaseRoute

    from tests.factories import World

VIEWERS = 200


class ByHeader:
    """
    Whoever a request says it is from, as long as they are allowed.
    """

    logs_in = False

    def __init__(self, organizations: dict[str, UUID]) -> None:
        self.organizations = organizations

    async def caller(self, request: HTTPConnection) -> Caller | None:
        """
        The caller, unless they were shut out.
        """
        organization, _, subject = request.headers["x-viewer"].partition("/")
        if organization not in self.organizations:
            return None
        return Caller(
            subject=subject,
            name=subject,
            organization_id=self.organizations[organization],
            role="coordinator",
        )

    def routes(self) -> list[BaseRoute]:
        """
        None.
        """
        return []


@dataclass(frozen=True, slots=True)
class Message:
    """
    What came over a stream.
    """

    id: str
    event: str
    data: dict[str, str]


@dataclass(slots=True)
class House:
    """
    A dashboard and who may come in.
    """

    desk: Desk
    app: Dashboard
    access: ByHeader
    url: str

    @asynccontextmanager
    async def watch(
        self, viewer: str = "hlf/viewer", query: str = "", **headers: str
    ) -> AsyncIterator[AsyncIterator[Message]]:
        """
        A stream, as a browser opens it.
        """
        timeout = httpx.Timeout(30)
        async with (
            httpx.AsyncClient(trust_env=False, timeout=timeout) as client,
            client.stream(
                "GET", f"{self.url}/stream?{query}", headers={"x-viewer": viewer} | headers
            ) as answer,
        ):
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield _messages(answer)


async def _messages(answer: httpx.Response) -> AsyncIterator[Message]:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        elif "event" in fields:
            yield Message(fields.get("id", ""), fields["event"], json.loads(fields["data"]))
            fields = {}


async def _state(messages: AsyncIterator[Message], words: str) -> Message:
    """
    The first state in which something is to be read.
    """
    async for message in messages:
        if message.event == "state" and words in message.data["html"]:
            return message
    raise AssertionError(f"The stream ended without: {words}")


@pytest.fixture
async def house(world: World) -> AsyncIterator[House]:
    """
    A dashboard that both organisations use.
    """
    access = ByHeader({"hlf": world.hlf, "other": world.other})
    app = create_app(world.engine, access=access, timezone="Europe/Oslo")
    async with served(app) as url:
        yield House(Desk(world), app, access, url)


async def test_what_changes_comes_by_itself_and_goes_by_itself(house: House) -> None:
    """
    First how things stand, then each change, under ids of their own.
    """
    async with house.watch() as messages:
        first = await _state(messages, "Alt er i orden")
        mentor = await house.desk.wanted()
        await house.desk.on_its_way(mentor)
        alert = await _state(messages, "1 mentor kan fortsatt være synlig i portalen")
        assert alert.data["title"].startswith("(1) ")
        await house.desk.deliver()
        last = await _state(messages, "Alt er i orden")
        assert len({first.id, alert.id, last.id}) == 3
        assert "A mentor" in last.data["html"]  # among what was put in order lately


async def test_a_notification_is_enough_to_look_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Even if the next look is an hour away.
    """
    monkeypatch.setattr(stream, "LOOK_SECONDS", 3600)
    async with house.watch() as messages:
        await _state(messages, "Alt er i orden")
        await house.desk.failing()
        house.app.state.hub.wake()
        await _state(messages, "1 mentor kan fortsatt være synlig i portalen")


async def test_whoever_notifies_is_heard(
    world: World, direct_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As the workers are woken, so are live pages.
    """

    async def connect() -> psycopg.AsyncConnection[object]:
        return await psycopg.AsyncConnection.connect(direct_url, autocommit=True)

    monkeypatch.setattr(stream, "LOOK_SECONDS", 3600)
    access = ByHeader({"hlf": world.hlf})
    app = create_app(world.engine, access=access, timezone="Europe/Oslo", connect_listener=connect)
    async with served(app) as url, House(Desk(world), app, access, url).watch() as messages:
        await _state(messages, "Alt er i orden")
        await Desk(world).failing()
        telling = asyncio.create_task(_tell_until_heard(world))
        await _state(messages, "1 mentor kan fortsatt være synlig i portalen")
        telling.cancel()


async def _tell_until_heard(world: World) -> None:
    while True:  # nobody knows when the listener has begun to listen
        await notify(world.engine)
        await asyncio.sleep(0.1)


async def test_a_quiet_stream_gives_signs_of_life(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As of a time; whoever comes back and has the newest state gets nothing else.
    """
    monkeypatch.setattr(stream, "BEAT_SECONDS", 0.01)
    async with house.watch() as messages:
        first = await _state(messages, "Alt er i orden")
        beat = await anext(messages)
        assert beat.event == "beat"
        assert beat.data["clock"].startswith("kl. ")
        async with house.watch("hlf/another", **{"last-event-id": first.id}) as again:
            assert (await anext(again)).event == "beat"


async def test_nothing_is_said_as_of_now_when_the_database_said_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A page would take a sign of life for "nothing new".
    """

    async def lost(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(stream.Hub, "_look", lost)
    monkeypatch.setattr(stream, "BEAT_SECONDS", 0.01)
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("GET", f"{house.url}/stream", headers={"x-viewer": "hlf/v"}) as answer,
    ):
        lines = answer.aiter_lines()
        heard = [await anext(lines) for _ in range(20)]
    assert {line for line in heard if line} == {f"retry: {stream.RECONNECT_MILLISECONDS}", ":"}


async def test_a_mentors_page_is_live_too(house: House) -> None:
    """
    Its state and its time line, in the language asked for.
    """
    mentor, _ = await house.desk.failing()
    async with house.watch(query=f"mentor={mentor.id}&lang=en") as messages:
        await _state(messages, "We could not hide the mentor.")
        await house.desk.on_its_way(mentor)
        await _state(messages, "mentor may still be visible on portal")
        await house.desk.deliver()
        state = await _state(messages, "Dynamics confirmed that the mentor is hidden")
        assert state.data["title"] == "A mentor: Up to date"


async def test_of_a_mentor_who_is_not_theirs_nobody_hears(house: House) -> None:
    """
    Neither of another organisation's nor of nobody.
    """
    mentor, _ = await house.desk.failing()
    for mentor_id in (mentor.id, uuid4()):
        async with house.watch("other/viewer", f"mentor={mentor_id}") as messages:
            assert [message.event async for message in messages] == ["ended"]


async def test_organisations_watch_apart(house: House) -> None:
    """
    What happens at one is not told to the other, who goes on as before.
    """
    async with house.watch("hlf/v") as ours, house.watch("other/v") as theirs:
        await _state(ours, "Alt er i orden")
        await _state(theirs, "Alt er i orden")
        await house.desk.failing()
        await _state(ours, "1 mentor kan fortsatt være synlig i portalen")
        other = await house.desk.wanted(organization_id=house.desk.world.other, visible=True)
        await house.desk.on_its_way(other)
        told = await _state(theirs, "1 mentor er kanskje ikke synlig i portalen ennå")
        assert "kan fortsatt være synlig" not in told.data["html"]


async def test_whoever_may_not_watch_any_more_is_told_so(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Logged out, or shut out: the stream does not outlive the session for long.
    """
    monkeypatch.setattr(stream, "CHECK_SECONDS", 0)
    monkeypatch.setattr(stream, "BEAT_SECONDS", 0.01)
    async with house.watch() as messages:
        await _state(messages, "Alt er i orden")
        del house.access.organizations["hlf"]
        events = [message.event async for message in messages]
        assert events[-1] == "ended"


async def test_one_person_watches_only_so_much(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One stream too many is refused, others are not; closing one makes room.
    """
    monkeypatch.setattr(stream, "MOST_STREAMS", 1)

    async def status(viewer: str) -> int:
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("GET", f"{house.url}/stream", headers={"x-viewer": viewer}) as answer,
        ):
            return answer.status_code

    async with house.watch("hlf/a") as messages:
        await _state(messages, "Alt er i orden")
        assert await status("hlf/a") == 429
        assert await status("hlf/b") == 200

    async def room() -> bool:
        return await status("hlf/a") == 200

    await until(room)


async def test_when_nobody_watches_nobody_looks(house: House) -> None:
    """
    The last one to leave ends the looking.
    """
    async with house.watch() as messages:
        await _state(messages, "Alt er i orden")
        assert house.app.state.hub._desks
    await until(lambda: not house.app.state.hub._desks)


async def test_two_hundred_watch_at_once_and_the_end_does_not_wait_for_them(
    world: World,
) -> None:
    """
    Each of them sees the alert, and then is let go.
    """
    access = ByHeader({"hlf": world.hlf})
    app = create_app(world.engine, access=access, timezone="Europe/Oslo")
    desk = Desk(world)
    async with asyncio.TaskGroup() as viewers, served(app) as url:
        house = House(desk, app, access, url)
        watching: set[int] = set()
        alerted: set[int] = set()

        async def view(number: int) -> None:
            async with house.watch(f"hlf/{number}") as messages:
                await _state(messages, "Alt er i orden")
                watching.add(number)
                await _state(messages, "1 mentor kan fortsatt være synlig i portalen")
                alerted.add(number)
                async for _ in messages:
                    pass

        for number in range(VIEWERS):
            viewers.create_task(view(number))
        await until(lambda: len(watching) == VIEWERS, seconds=60)
        await desk.failing()
        await until(lambda: len(alerted) == VIEWERS, seconds=60)
        # The server has ended while all of them still watched.

"""
What the page shows, as HTML: read as its caller, told in their language.

A view is what can be watched: the overview, or one mentor. Its fragment is the same for everybody
of one organisation, role and language, so the stream makes it once for all of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode
from uuid import UUID

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from worker.coordinator import alerts, mentors, nights
from worker.coordinator.wording import LANGUAGES, Words
from worker.database import reading
from worker.release import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from worker.coordinator.callers import Caller
    from worker.coordinator.wording import Language

Kind = Literal["overview", "mentor"]

MOST_SHOWN = 1000
"""Rows of a table, however many are asked for."""

CENSUS_SECONDS = 20.0
"""How long a count that reads every mentor is good for; the green answer is good for 30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """
    What somebody looks at.

    Args:
        shown: rows of each table.
    """

    kind: Kind
    mentor_id: UUID | None = None
    shown: int = alerts.SHOWN

    @property
    def address(self) -> str:
        """
        Of the page that shows it.
        """
        if self.mentor_id is not None:
            return f"/mentors/{self.mentor_id}"
        return "/" if self.shown == alerts.SHOWN else f"/?shown={self.shown}"

    @property
    def query(self) -> dict[str, str]:
        """
        As the stream is asked for it.
        """
        if self.mentor_id is not None:
            return {"mentor": str(self.mentor_id)}
        return {"shown": str(self.shown)}


def view_of(query: Mapping[str, str]) -> View:
    """
    What a query asks for; what is not understood is the overview.
    """
    try:
        if "mentor" in query:
            return View(kind="mentor", mentor_id=UUID(query["mentor"]))
        shown = int(query.get("shown", alerts.SHOWN))
    except ValueError:
        return View(kind="overview")
    return View(kind="overview", shown=max(1, min(MOST_SHOWN, shown)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """
    The part of a page that is live.

    Args:
        title: of the window, with the number that matters.
    """

    title: str
    html: str
    looked_at: datetime


class NotFoundError(Exception):
    """
    There is no such mentor, for this caller.
    """


class Views:
    """
    Reads and renders.

    Args:
        engine: bound, so that what is read is the caller's.
    """

    def __init__(self, engine: AsyncEngine, *, timezone: str) -> None:
        self._engine = engine
        self._words = {language: Words(language, timezone=timezone) for language in LANGUAGES}
        self._census: dict[UUID, tuple[float, int]] = {}
        self._templates = Environment(
            loader=PackageLoader("worker.coordinator"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def words(self, language: Language) -> Words:
        """
        The texts of a language.
        """
        return self._words[language]

    def render(self, template: str, *, language: Language, now: datetime, **context: Any) -> str:  # noqa: ANN401 (of the template)
        """
        A template in a language, at a moment.
        """
        words = self._words[language]
        return self._templates.get_template(template).render(
            t=words,
            clock=partial(words.clock, now=now),
            ago=partial(words.ago, now=now),
            reason=partial(alerts.reason, words=words),
            most=alerts.MOST_COUNTED,
            now=now,
            version=VERSION,
            static=_static,
            **context,
        )

    async def fragment(self, view: View, *, caller: Caller, language: Language) -> Fragment:
        """
        What a view shows now.

        Raises:
            NotFoundError: it is of a mentor who is not there.
        """
        async with reading(self._engine) as connection:
            if view.mentor_id is not None:
                return await self._mentor(connection, view, caller, language)
            return await self._overview(connection, view, caller, language)

    async def _overview(
        self, connection: AsyncConnection, view: View, caller: Caller, language: Language
    ) -> Fragment:
        organization_id = caller.organization_id
        board = await alerts.board(
            connection,
            organization_id=organization_id,
            unaccounted=await self._unaccounted(connection, organization_id),
            shown=view.shown,
        )
        lately = await alerts.settled_lately(
            connection, organization_id=organization_id, shown=view.shown
        )
        night = await nights.last(connection, organization_id=organization_id)
        words = self._words[language]
        number = board.maybe_visible + board.maybe_hidden + board.unaccounted
        title = (
            words("page.title_with_number", number=words.number(number))
            if number
            else words("page.title")
        )
        html = self.render(
            "_overview.html",
            language=language,
            now=board.looked_at,
            board=board,
            lately=lately,
            shown=view.shown,
            lately_days=alerts.LATELY_DAYS,
            night=night,
            may_act=caller.role == "coordinator",
            here=view.address,
            more=replace(view, shown=min(MOST_SHOWN, view.shown * 4)).address,
            may_show_more=view.shown < MOST_SHOWN,
        )
        return Fragment(title=title, html=html, looked_at=board.looked_at)

    async def _mentor(
        self, connection: AsyncConnection, view: View, caller: Caller, language: Language
    ) -> Fragment:
        assert view.mentor_id is not None  # noqa: S101 (as it was asked)
        told = await mentors.mentor(
            connection, view.mentor_id, organization_id=caller.organization_id
        )
        if told is None:
            raise NotFoundError
        looked_at = (await connection.execute(alerts.CLOCK)).scalar_one()
        words = self._words[language]
        html = self.render(
            "_mentor.html",
            language=language,
            now=looked_at,
            mentor=told,
            cause=alerts.cause(told.error_code),
            may_act=caller.role == "coordinator",
            here=view.address,
        )
        name = told.name or words("table.nameless")
        state = words(f"state.{told.state}")
        return Fragment(title=f"{name}: {state}", html=html, looked_at=looked_at)

    async def _unaccounted(self, connection: AsyncConnection, organization_id: UUID) -> int:
        counted_at, number = self._census.get(organization_id, (-CENSUS_SECONDS, 0))
        if time.monotonic() - counted_at >= CENSUS_SECONDS:
            number = await alerts.unaccounted(connection, organization_id=organization_id)
            self._census[organization_id] = (time.monotonic(), number)
        return number

    async def organization_name(self, organization_id: UUID) -> str | None:
        """
        None if it has none, or nobody may see it: the table may be somebody else's.
        """
        try:
            async with reading(self._engine) as connection:
                name: str | None = await connection.scalar(NAME, {"id": organization_id})
        except ProgrammingError:
            return None
        return name


NAME = text("SELECT name FROM public.organizations WHERE id = :id")


def stream_address(view: View, language: Language) -> str:
    """
    Where a page listens for what changes.
    """
    return "/stream?" + urlencode(view.query | {"lang": language})


def _static(name: str) -> str:
    """
    Where a file of ours is; another version of it is elsewhere.
    """
    return f"/static/{name}?v={_VERSIONS[name]}"


def _version_of(name: str) -> str:
    content = files("worker.coordinator").joinpath("static", name).read_bytes()
    return sha256(content).hexdigest()[:12]


_VERSIONS = {name: _version_of(name) for name in ("page.css", "page.js", "icon.svg")}

"""
Builders that name only what matters to a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import text

from worker.certifications.transitions import CertificationManagementService

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncEngine

TODAY = date(2026, 11, 24)
YESTERDAY = TODAY - timedelta(days=1)
NEXT_YEAR = TODAY + timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mentor:
    """
    A mentor with one certification.
    """

    id: UUID
    certification_id: UUID
    dynamics_id: UUID | None


class World:
    """
    HLF, another organisation, and their mentors, in a real database.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.hlf = uuid4()
        self.other = uuid4()

    async def settle_in(self) -> None:
        """
        Make the two organisations.
        """
        await self.execute(
            "INSERT INTO public.organizations (id, name) VALUES (:hlf, 'HLF'), (:other, 'Other')",
            hlf=self.hlf,
            other=self.other,
        )

    @property
    def certifications(self) -> CertificationManagementService:
        """
        The transitions, as HLF's process has them.
        """
        return CertificationManagementService(
            self.engine, organization_id=self.hlf, timezone="Europe/Oslo"
        )

    async def mentor(
        self,
        *,
        organization_id: UUID | None = None,
        expires_on: date = YESTERDAY,
        linked: bool = True,
    ) -> Mentor:
        """
        A mentor whose certification has run out, unless said otherwise.
        """
        mentor = Mentor(
            id=uuid4(), certification_id=uuid4(), dynamics_id=uuid4() if linked else None
        )
        await self.execute(
            "INSERT INTO public.mentors (id, organization_id, full_name, dynamics_id)"
            " VALUES (:id, :organization_id, 'A mentor', :dynamics_id)",
            id=mentor.id,
            organization_id=organization_id or self.hlf,
            dynamics_id=mentor.dynamics_id,
        )
        await self.certification(
            mentor.id, certification_id=mentor.certification_id, expires_on=expires_on
        )
        return mentor

    async def mentors(self, number: int, *, expires_on: date = YESTERDAY) -> list[Mentor]:
        """
        So many mentors of HLF, certified until this day.
        """
        mentors = [
            Mentor(id=uuid4(), certification_id=uuid4(), dynamics_id=uuid4()) for _ in range(number)
        ]
        await self.execute(
            "INSERT INTO public.mentors (id, organization_id, full_name, dynamics_id)"
            " SELECT id, :organization_id, 'A mentor', dynamics_id"
            " FROM unnest(CAST(:ids AS uuid[]), CAST(:links AS uuid[])) AS m (id, dynamics_id)",
            organization_id=self.hlf,
            ids=[mentor.id for mentor in mentors],
            links=[mentor.dynamics_id for mentor in mentors],
        )
        await self.execute(
            "INSERT INTO public.certifications (id, mentor_id, expires_on)"
            " SELECT id, mentor_id, :expires_on"
            " FROM unnest(CAST(:ids AS uuid[]), CAST(:mentors AS uuid[])) AS c (id, mentor_id)",
            expires_on=expires_on,
            ids=[mentor.certification_id for mentor in mentors],
            mentors=[mentor.id for mentor in mentors],
        )
        return mentors

    async def certification(
        self, mentor_id: UUID, *, expires_on: date = NEXT_YEAR, certification_id: UUID | None = None
    ) -> UUID:
        """
        One more certification of a mentor.
        """
        certification_id = certification_id or uuid4()
        await self.execute(
            "INSERT INTO public.certifications (id, mentor_id, expires_on)"
            " VALUES (:id, :mentor_id, :expires_on)",
            id=certification_id,
            mentor_id=mentor_id,
            expires_on=expires_on,
        )
        return certification_id

    async def execute(self, statement: str, **parameters: object) -> None:
        """
        Run one statement and commit.
        """
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), parameters)

    async def rows(self, query: str, **parameters: object) -> Sequence[Row[Any]]:
        """
        The rows of a query.
        """
        async with self.engine.connect() as connection:
            return (await connection.execute(text(query), parameters)).all()

    async def row(self, query: str, **parameters: object) -> Row[Any]:
        """
        The one row of a query.
        """
        [row] = await self.rows(query, **parameters)
        return row

    async def value(self, query: str, **parameters: object) -> Any:  # noqa: ANN401 (whatever the query selects)
        """
        The one value of a query.
        """
        return (await self.row(query, **parameters))[0]

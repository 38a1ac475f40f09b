"""
What the tests write is searched for secrets: in every table, and by whatever means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests import canaries

if TYPE_CHECKING:
    from tests.factories import World
    from tests.rows import Rows

SECRET = canaries.WORD + "of-a-row"


async def test_a_row_that_holds_one_is_found(world: World, rows: Rows) -> None:
    """
    As text or deep in a document, with the name of its table.
    """
    await world.execute("UPDATE public.organizations SET name = :name", name=SECRET)
    await world.execute(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " VALUES ('elsewhere', 'k', :hlf, 1, jsonb_build_object('a', CAST(:text AS text)))",
        hlf=world.hlf,
        text=SECRET,
    )

    found = {row.partition(":")[0] for row in rows.with_canaries()}

    assert found == {"public.organizations", "outbox.events"}
    rows.sweep()
    assert rows.with_canaries() == []

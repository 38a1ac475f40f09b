from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World


@pytest.fixture
async def site(world: World, database_url: str, direct_url: str) -> AsyncIterator[Site]:
    """
    A database, the sandbox in Dynamics' place, and an environment for real processes.
    """
    async with open_site(world, database_url, direct_url=direct_url) as site:
        yield site

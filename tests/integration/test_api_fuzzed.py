"""
The API's description, taken at its word: whatever fits it, and much that does not, is answered.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.desk import Desk
from tests.openid import site_with_login
from worker.coordinator.openapi import DOCUMENT

if TYPE_CHECKING:
    from schemathesis import Case

    from tests.factories import World

EXAMPLES = 25
"""Of each operation and kind."""

SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)

OPERATIONS = [
    f"{method.upper()} {path}"
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if method in {"get", "post"}
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_the_api_answers_as_it_is_described(
    world: World, operation: str, mode: GenerationMode
) -> None:
    """
    Status, media type and shape; never a 5xx.
    """
    desk = Desk(world)
    mentor, failure_id = await desk.failing()
    real = {
        "failures": str(failure_id),
        "mentors": str(mentor.id),
        "certifications": str(mentor.certification_id),
    }
    method, _, path = operation.partition(" ")
    strategy = SCHEMA[path][method].as_strategy(generation_mode=mode)

    async with site_with_login(world) as site:
        headers = {"Authorization": f"Bearer {site.provider.token()}"}

        @seed(20261124)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def answers(case: Case[Any]) -> None:
            if "id" in case.path_parameters and mode is GenerationMode.POSITIVE:
                case.path_parameters["id"] = real[path.split("/")[3]]
            # A day may fit and have passed: that is refused, and described.
            case.call_and_validate(
                base_url=site.url, headers=headers, excluded_checks=[positive_data_acceptance]
            )

        await asyncio.to_thread(answers)

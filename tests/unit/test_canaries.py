"""
Canaries: what looks for secrets finds them.
"""

from __future__ import annotations

import base64
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests import canaries
from tests.acceptance.site import Run
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

SECRET = canaries.WORD + "of-this-test"


@pytest.mark.parametrize("before", ["", "a", "ab", "user:", '{"jti": "'])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_canary_is_found_in_base64_wherever_it_begins(before: str, encode: object) -> None:
    """
    As in a Basic header or in the claims of a token.
    """
    assert callable(encode)
    text = f"Authorization: Basic {encode((before + SECRET).encode()).decode()}"

    assert canaries.found(text)


def test_other_words_are_no_canaries() -> None:
    """
    Not even birds.
    """
    assert canaries.found("A canary. Y2FuYX In the mine.") == []


def test_a_command_that_prints_one_is_found_out() -> None:
    """
    On either stream.
    """
    with pytest.raises(AssertionError):
        Run(code=0, stdout="", stderr=SECRET)


PRINTING = f"""
import logging

def test_prints(): print("{SECRET}")
def test_logs(): logging.getLogger("x").warning("{SECRET}")
def test_keeps_quiet(): pass
"""


def test_a_test_that_prints_or_logs_one_fails(tmp_path: Path) -> None:
    """
    However green it would have been.
    """
    (tmp_path / "test_printing.py").write_text(PRINTING)
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_makereport")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", tmp_path],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert "2 failed, 1 passed" in done.stdout, done.stdout


async def test_an_answer_that_holds_one_is_found() -> None:
    """
    With the path that was asked.
    """

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": SECRET.encode()})

    async def receive() -> Message:
        raise NotImplementedError

    async def send(_message: Message) -> None:
        pass

    searched = canaries.Searched(app)
    await searched({"type": "http", "path": "/here"}, receive, send)

    assert searched.found == [f"/here: {SECRET}"]

"""
The peers in Node: who may be missing, and how it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.bench.contenders import node_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Program = Callable[[str, str], None]
    """Puts a program of this name on the PATH: a line of shell."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """
    A folder with a lock and nothing installed, and a PATH with nothing on it.
    """
    monkeypatch.setattr(node_peers, "FOLDER", tmp_path)
    monkeypatch.setattr(node_peers, "LOCK", tmp_path / "package-lock.json")
    monkeypatch.setattr(node_peers, "INSTALLED", tmp_path / "installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    node_peers.LOCK.touch()
    node_peers.missing.cache_clear()
    yield tmp_path
    node_peers.missing.cache_clear()


@pytest.fixture
def program(folder: Path) -> Program:
    """
    Puts programs on that PATH.
    """

    def put(name: str, line: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    return put


def test_without_node_it_says_so() -> None:
    """
    Nothing is tried.
    """
    assert node_peers.missing() == "Node with npm is not installed."


def test_an_old_node_is_told_which_is_needed(program: Program) -> None:
    """
    And what it is.
    """
    program("node", "echo v18.20.4")
    program("npm", "exit 0")

    assert node_peers.missing() == "Node v18.20.4 is too old: 20.18 is needed."


def test_a_failing_installation_is_a_reason_and_no_exception(program: Program) -> None:
    """
    With what npm said.
    """
    program("node", "echo v20.20.2")
    program("npm", "echo 'npm error network' >&2; exit 1")

    assert node_peers.missing() == "npm ci failed: npm error network"


def test_what_is_installed_is_not_installed_again(program: Program) -> None:
    """
    Nobody asks npm.
    """
    program("node", "echo v22.18.0")
    program("npm", "exit 1")
    node_peers.INSTALLED.touch()

    assert node_peers.missing() is None


def test_a_newer_lock_is_installed(program: Program) -> None:
    """
    It may have come with a new version of ours.
    """
    program("node", "echo v22.18.0")
    program("npm", ": > installed")

    assert node_peers.missing() is None
    assert node_peers.INSTALLED.exists()


def test_a_configuration_is_told_to_its_script(folder: Path) -> None:
    """
    By its name, before the role.
    """
    peer = node_peers.CONTENDERS[1]

    assert peer.worker(concurrency=10) == [
        "node",
        str(folder / "graphile_worker.js"),
        "graphile-worker:tuned",
        "work",
        "10",
    ]

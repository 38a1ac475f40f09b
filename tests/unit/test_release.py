"""
Which release this is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import ROOT
from worker.release import NAME, VERSION, version_of

if TYPE_CHECKING:
    from pathlib import Path


HIDING = """
import importlib.metadata

def version(_):
    raise importlib.metadata.PackageNotFoundError

importlib.metadata.version = version
"""


def test_an_installed_release_knows_its_version() -> None:
    """
    As the package's metadata have it.
    """
    assert version_of(NAME) == VERSION
    assert VERSION[0].isdigit()


def test_what_is_not_installed_runs_all_the_same(tmp_path: Path) -> None:
    """
    From its source alone, as the bench and whoever tries a checkout do.
    """
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import worker.bootstrap, worker.release; print(worker.release.VERSION)",
        ],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.stdout == "unknown\n", done.stderr

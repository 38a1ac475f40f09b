"""
Which release this is.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NAME = "hlf-dynamics-sync"


def version_of(package: str) -> str:
    """
    Its version; "unknown" where it runs from its source without being installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


VERSION = version_of(NAME)

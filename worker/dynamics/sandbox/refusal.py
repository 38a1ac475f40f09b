"""
Saying no to whoever sets the sandbox up: one exception, one sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SandboxError(ValueError):
    """
    Raised when the sandbox is told to do what it cannot; the text is one clear sentence.
    """


def sentence(subject: str, error: ValidationError) -> str:
    """
    The first finding of a validation as one sentence.

    Args:
        subject: what was validated, as the start of a sentence ("Wrong fault").
        error: at least one finding.
    """
    finding = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in finding["loc"])
    what = finding["msg"].removeprefix("Value error, ")
    place = f" at {where!r}" if where else ""
    return f"{subject}{place}: {what[:1].lower()}{what[1:]}."

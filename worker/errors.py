"""
What this service tells a person or a caller, as a tree; each class has its exit code.

    SyncError
    ├── UsageError                  2   a wrong argument; nothing was changed
    │   ├── UnknownCertificationError, UnknownMentorError, UnknownFailureError
    │   ├── RenewalNotInFutureError
    │   └── StillValidError
    ├── NotAllowedError             1   whoever asks may only look
    ├── UnreachableError           69   database or Dynamics cannot be reached
    ├── HeldError                  69   somebody else holds what has to be changed; nothing was
    ├── CommitUnknownError         69   nobody can tell whether a change was saved
    ├── SettingsError              78   a setting is missing or wrong
    └── SchemaError                78   the database is not migrated
    DynamicsSyncException               the change stands, the portal is not there yet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from uuid import UUID


class SyncError(Exception):
    """
    A sentence for a person, who can do something about it.
    """

    exit_code: ClassVar[int] = 1


class UsageError(SyncError):
    """
    An argument cannot be meant; nothing was changed.
    """

    exit_code = 2


class UnknownCertificationError(UsageError):
    """
    No certification has this id.
    """


class UnknownMentorError(UsageError):
    """
    No mentor has this id.
    """


class UnknownFailureError(UsageError):
    """
    No failure of this organisation has this id.
    """


class RenewalNotInFutureError(UsageError):
    """
    A renewal must reach into the future.
    """


class StillValidError(UsageError):
    """
    A certification that has not run out cannot expire.
    """


class NotAllowedError(SyncError):
    """
    Whoever asks may look, but not act.
    """


class UnreachableError(SyncError):
    """
    The database or Dynamics cannot be reached.
    """

    exit_code = 69


class HeldError(SyncError):
    """
    Somebody else holds what has to be changed; nothing was changed.
    """

    exit_code = 69


class CommitUnknownError(SyncError):
    """
    The connection broke while a change was saved, and nobody can say whether it was.
    """

    exit_code = 69


class SettingsError(SyncError):
    """
    A setting is missing or wrong.
    """

    exit_code = 78


class SchemaError(SyncError):
    """
    The database does not have the tables of this release.
    """

    exit_code = 78


class DynamicsSyncException(Exception):  # noqa: N818 (the name the app's developers know)
    """
    The change is saved and stands, but Dynamics has not confirmed it yet.

    A warning to show, never a reason to repeat or undo the change: `str()` of it is the
    sentence for the app, e.g. "Portal visibility update pending".

    Args:
        state: `pending` while it is still being tried, `failed` when a person is needed.
        error_code: why the last attempt failed, if there was one.
    """

    def __init__(
        self, mentor_id: UUID, *, state: Literal["pending", "failed"], error_code: str | None
    ) -> None:
        super().__init__(f"Portal visibility update {state}")
        self.mentor_id = mentor_id
        self.state = state
        self.error_code = error_code

"""
What can go wrong, as a tree.

    OutboxError
    └── DeliveryError(code, message, doubtful)    raised by a destination's handler
        ├── TransientError      retried by the policy, then dead; re-driven after an outage
        ├── ThrottledError      the gate closes until `retry_after`; no attempt is burnt
        ├── PermanentError      dead at once; only a person or a newer state helps
        └── ConfigurationError  the gate closes until somebody mends it; nothing is burnt

A handler that raises anything else is treated as transient, with the exception's
class name as code: a bug in a handler must not lose an event.
"""

from __future__ import annotations

CODE_LENGTH = 64
MESSAGE_LENGTH = 500


class OutboxError(Exception):
    """
    Every error that this library raises on purpose.
    """


class DeliveryError(OutboxError):
    """
    A destination did not confirm a delivery.

    Args:
        code: short and stable, for machines and support; no free text.
        message: one sentence for people; never a secret, never a raw answer.
        doubtful: the request may yet take effect (a timeout, a reset after sending),
            so a later, different state has to be asserted again when that is past.
    """

    def __init__(self, code: str, message: str, *, doubtful: bool = False) -> None:
        super().__init__(message)
        self.code = _storable(code)[:CODE_LENGTH]
        self.message = _storable(message)[:MESSAGE_LENGTH]
        self.doubtful = doubtful


def _storable(value: str) -> str:
    """
    Without control characters: PostgreSQL stores no NUL, and a log line is one line.
    """
    return "".join(character for character in value if character.isprintable())


class TransientError(DeliveryError):
    """
    Trying again soon may help.
    """


class ThrottledError(DeliveryError):
    """
    The destination asked everybody to wait.

    Args:
        retry_after: seconds to keep away, or None if the destination did not say.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry_after: float | None = None,
        doubtful: bool = False,
    ) -> None:
        super().__init__(code, message, doubtful=doubtful)
        self.retry_after = retry_after


class PermanentError(DeliveryError):
    """
    Trying this event again cannot help; others are not concerned.

    Args:
        unsent: found out without a request, so it says nothing about the destination.
    """

    def __init__(
        self, code: str, message: str, *, doubtful: bool = False, unsent: bool = False
    ) -> None:
        super().__init__(code, message, doubtful=doubtful)
        self.unsent = unsent


class ConfigurationError(DeliveryError):
    """
    No event can be delivered before somebody mends the set-up.
    """

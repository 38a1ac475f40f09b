"""
A port to listen at: taken once, before anything is promised.
"""

from __future__ import annotations

import socket

from worker.errors import SettingsError

BACKLOG = 512


def bind(host: str, port: int, *, variables: str) -> socket.socket:
    """
    A socket that listens; with port 0 at any that is free.

    Args:
        variables: that the address came from, for the sentence.

    Raises:
        SettingsError: the address is not to be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"{variables}: cannot listen on {host}:{port}: {reason}.") from None
    listener.setblocking(False)  # noqa: FBT003 (as the socket has it)
    return listener


def address_of(listener: socket.socket) -> str:
    """
    The listener's address as a browser takes it, without a slash at its end.
    """
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

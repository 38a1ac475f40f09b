"""
What the doctor says of Dynamics, the Edge Function and the reminders' webhook.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from outbox.errors import ConfigurationError, DeliveryError
from worker import bootstrap
from worker.doctor.finding import broken, unreachable, well
from worker.errors import SettingsError
from worker.settings import DynamicsSettings, EdgeSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.doctor.finding import Finding
    from worker.settings import Settings

CONNECT_SECONDS = 5.0


async def examine_dynamics() -> AsyncIterator[Finding]:
    """
    Settings, address and token; nothing but a token is asked of Microsoft.
    """
    async with AsyncExitStack() as stack:
        try:
            where = DynamicsSettings.load()
            bootstrap.dynamics_target(where)
            auth = await stack.enter_async_context(bootstrap.open_authentication())
        except SettingsError as error:
            yield broken("Dynamics settings", str(error), "Set it; the README lists them.")
            return
        yield well("Dynamics settings", f"{where.operation} at {where.url}")
        yield await _reach(where.url, about="Dynamics", variable="HLF_DYNAMICS_URL")
        try:
            await auth.prove()
        except ConfigurationError as error:
            yield broken("token", error.message, "Check tenant, client id and secret in Entra ID.")
        except DeliveryError as error:
            yield unreachable("token", error.message, "Check HLF_DYNAMICS_AUTHORITY and network.")
        else:
            yield well("token", f"{where.authority} gave one")


async def examine_reminders(settings: Settings) -> AsyncIterator[Finding]:
    """
    Settings and address of the webhook; nothing is sent.
    """
    if not settings.reminder_url:
        yield well("reminders' settings", "no HLF_REMINDER_URL: reminders wait")
        return
    try:
        async with bootstrap.open_webhook(settings):
            days = ", ".join(map(str, settings.reminder_days))
            yield well("reminders' settings", f"{days} days before the end, signed")
    except SettingsError as error:
        yield broken("reminders' settings", str(error), "Set it; the README lists them.")
        return
    yield await _reach(settings.reminder_url, about="webhook", variable="HLF_REMINDER_URL")


async def examine_edge(settings: Settings) -> AsyncIterator[Finding]:
    """
    The function is asked whether it takes our key, has our target and can get a token.
    """
    async with AsyncExitStack() as stack:
        try:
            where = EdgeSettings.load()
            edge = await stack.enter_async_context(bootstrap.open_edge(settings))
        except SettingsError as error:
            yield broken("Dynamics settings", str(error), "Set it; the README lists them.")
            return
        yield well("Dynamics settings", f"{where.operation} at {where.url}, by {where.edge_url}")
        yield await _reach(where.edge_url, about="Edge Function", variable="HLF_EDGE_URL")
        try:
            await edge.prove(seconds=CONNECT_SECONDS)
        except ConfigurationError as error:
            yield broken("token", error.message, "Compare the function's secrets with these.")
        except DeliveryError as error:
            yield unreachable("token", error.message, "See the function's log, then try again.")
        else:
            yield well("token", "the Edge Function knows us and got one")


async def _reach(url: str, *, about: str, variable: str) -> Finding:
    """
    Open a connection and close it: nothing is read there, not even for this.
    """
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc}"  # a webhook's path may be a secret of its own
    port = parts.port or (443 if parts.scheme == "https" else 80)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
            writer.close()
            await writer.wait_closed()
    except ssl.SSLCertVerificationError:
        return broken(
            about, "its certificate is not trusted", "Install the CA, or mend the address."
        )
    except (OSError, TimeoutError):
        return unreachable(about, f"{shown} does not answer", f"Check {variable} and the network.")
    return well(about, f"{shown} can be reached")

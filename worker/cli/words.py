"""
What the commands say about the portal: as JSON with stable keys, and in plain words.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from worker.cli.session import many
from worker.coordinator.alerts import GIVEN_UP_DAYS, reason

if TYPE_CHECKING:
    from outbox.gate import Gate
    from worker.cli.session import Session
    from worker.coordinator import alerts


def status_document(now: alerts.Status) -> dict[str, Any]:
    """
    A status as JSON; the keys are stable.
    """
    return asdict(now) | {
        "gate": _gate_document(now.gate),
        "waiting": now.waiting,
        "failed": now.failed,
        "maybe_wrongly_visible": now.maybe_wrongly_visible,
    }


def reminders_document(now: alerts.Reminders) -> dict[str, Any]:
    """
    How reminders stand as JSON; the keys are stable.
    """
    return asdict(now) | {"gate": _gate_document(now.gate)}


def _gate_document(gate: Gate) -> dict[str, Any]:
    """
    JSON has no infinity.
    """
    return asdict(gate) | {"seconds": None if gate.seconds == float("inf") else gate.seconds}


def status_sentences(session: Session, now: alerts.Status) -> list[str]:
    """
    A status as a coordinator reads it: the answer first, then why.
    """
    sentences = []
    if now.maybe_wrongly_visible:
        sentences.append(
            f"{many(now.maybe_wrongly_visible, 'mentor')} may still be visible on the portal."
        )
    if hidden := now.waiting_to_show + now.failed_to_show:
        sentences.append(f"{many(hidden, 'mentor')} may not be visible on the portal yet.")
    if now.unaccounted:
        sentences.append(
            f"{many(now.unaccounted, 'mentor')} may be wrong on the portal and nothing is on "
            "its way: run `hlf-sync resync`."
        )
    if not sentences:
        sentences.append(f"Everything is in order: {many(now.in_order, 'mentor')}.")
    if now.waiting:
        sentences.append(
            f"{now.waiting} on the way, the oldest for {lasting(now.oldest_waiting_seconds)}."
        )
    if now.failed:
        need = "needs" if now.failed == 1 else "need"
        sentences.append(f"{now.failed} {need} a person: see `hlf-sync failures`.")
    if now.by_hand:
        sentences.append(f"{many(now.by_hand, 'mentor')} done by hand in Dynamics, as people said.")
    if sentence := gate_sentence(session, now.gate):
        sentences.append(sentence)
    return sentences


def reminder_sentences(session: Session, now: alerts.Reminders) -> list[str]:
    """
    What there is to say about reminders; nothing if all went out.
    """
    sentences = []
    if now.waiting:
        wait = "waits" if now.waiting == 1 else "wait"
        sentences.append(f"{many(now.waiting, 'reminder')} {wait} to be sent.")
    if now.waiting and not session.settings.reminder_url:
        sentences.append("HLF_REMINDER_URL is not set: no reminder is sent before it is.")
    elif now.gate.state != "open":
        again = session.clock(now.gate.closed_until)
        message = f" {now.gate.message}" if now.gate.reason == "configuration" else ""
        sentences.append(
            f"The webhook of reminders does not take them.{message} It is tried "
            f"again at {again}; nothing is lost."
        )
    if now.given_up:
        was = "was" if now.given_up == 1 else "were"
        why = reason(now.last_error_code)
        sentences.append(
            f"{many(now.given_up, 'reminder')} {was} given up in the last "
            f"{GIVEN_UP_DAYS} days; the last because: {why}."
        )
    return sentences


def lasting(seconds: float) -> str:
    """
    How long something has lasted: "45 s", "3 min", "5 h", "2 days".
    """
    for length, unit in ((86400, " days"), (3600, " h"), (60, " min")):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f} s"


def gate_sentence(session: Session, gate: Gate) -> str:
    """
    Why nothing is sent, or "" if the gate is open.
    """
    again = session.clock(gate.closed_until)
    if gate.state == "open":
        return ""
    if gate.state == "half-open":
        return "Dynamics failed before; it is being tried with one mentor."
    match gate.reason:
        case "operator":
            return f"Sending was paused by {gate.closed_by}: {gate.message} Run `hlf-sync resume`."
        case "throttled":
            return f"Dynamics asked us to wait; sending goes on at {again}."
        case "configuration":
            return (
                f"Dynamics refuses us. {gate.message} Mend it and run `hlf-sync resume`, or "
                f"wait: it is tried again at {again}."
            )
        case _:
            return f"Dynamics does not answer; it is tried again at {again}. Nothing is lost."

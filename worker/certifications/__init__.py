"""
Certifications and what follows from them.

    reminders       who is to be told that a certification runs out, once for each threshold
    transitions     expire and renew, each in one transaction
    reconciliation  what somebody changed without a transition is made up for
    pauses          automatic ones, and those by hand
    visibility      what the portal has to show, with its version, and the event that says so
    confirmations   what Dynamics acknowledged, what failed, and waiting for either

Nothing here knows Dynamics; another application may import it to renew a certification.
"""

from __future__ import annotations

from worker.certifications.pauses import PauseManagementService
from worker.certifications.reminders import CertificationReminderService, Reminded
from worker.certifications.transitions import CertificationManagementService, Transition
from worker.errors import DynamicsSyncException

__all__ = [
    "CertificationManagementService",
    "CertificationReminderService",
    "DynamicsSyncException",
    "PauseManagementService",
    "Reminded",
    "Transition",
]

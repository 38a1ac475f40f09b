"""
The way to Dynamics 365: one column of one record is set, nothing is ever read.

    service    which record, or why none     HLFDynamicsSyncService.update_portal_visibility
    edge       through the Edge Function     EdgeClient.set_visibility
    batch      several values at once        Batcher.set_visibility
    client     what is asked, what it means  DynamicsClient.set_visibility
    multipart  the bytes of a batch          pure functions
    exchange   one request, one deadline     Exchange.answer
    token      Entra ID's token, shared      EntraAuth
    errors     what an answer means          tables and pure functions
    edge_errors  the same of the function    tables and pure functions
    sandbox/   a pretend Entra ID and Dataverse, with faults to order

Imports point down this list. A process serves one organisation, so it has one of each.
"""

from __future__ import annotations

from worker.dynamics.batch import Batcher
from worker.dynamics.client import DynamicsClient, DynamicsTarget, dynamics_client
from worker.dynamics.edge import EdgeClient, EdgeKey, edge_client
from worker.dynamics.service import HLFDynamicsSyncService, MentorLink
from worker.dynamics.token import EntraAuth

__all__ = [
    "Batcher",
    "DynamicsClient",
    "DynamicsTarget",
    "EdgeClient",
    "EdgeKey",
    "EntraAuth",
    "HLFDynamicsSyncService",
    "MentorLink",
    "dynamics_client",
    "edge_client",
]

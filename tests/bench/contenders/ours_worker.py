"""
Become `hlf-sync worker`, with the bench's environment told as settings.

A module of its own, so that little is imported before that.

    python -m tests.bench.contenders.ours_worker CONCURRENCY BATCH
"""

from __future__ import annotations

import os
import sys
import tempfile

ORGANIZATION = "6f1c1f5e-6a3b-4f0e-9d0f-3d8f1c2b7a10"

TENANT = "hlf.example"
CLIENT = "hlf-sync"
SECRET = "a secret"  # noqa: S105 (it opens nothing but a pretend Dynamics)


def become_worker(concurrency: str, batch: str) -> None:
    """
    Does not return.
    """
    with tempfile.NamedTemporaryFile("w", delete=False) as secret:
        secret.write(SECRET)
    api = os.environ["BENCH_API_URL"]
    settings = {
        "DATABASE_URL": os.environ["BENCH_DATABASE_URL"],
        "HLF_ORGANIZATION_ID": ORGANIZATION,
        "HLF_DYNAMICS_URL": api,
        "HLF_DYNAMICS_AUTHORITY": api,
        "HLF_DYNAMICS_TENANT_ID": TENANT,
        "HLF_DYNAMICS_CLIENT_ID": CLIENT,
        "HLF_DYNAMICS_CLIENT_SECRET_FILE": secret.name,
        "HLF_SYNC_CONCURRENCY": concurrency,
        "HLF_SYNC_BATCH": batch,
    }
    command = [sys.executable, "-m", "worker", "worker"]
    os.execve(sys.executable, command, os.environ | settings)  # noqa: S606 (no shell is meant)


if __name__ == "__main__":
    become_worker(*sys.argv[1:])

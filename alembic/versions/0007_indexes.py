"""
The claim order is for claims, whatever the server believes of the table.

A queue is empty most of the time. An analysis at such a moment, or while the rows of a big
transaction are not yet committed, tells the server that it always is; every index then costs the
same, and the claim order was read from end to end to find one id or one key. Now it can be used
by whoever asks when an event is due, and by nobody else.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

CLAIM_ORDER = """
CREATE INDEX events_claim_order
    ON outbox.events (destination, organization_id, priority, available_at, id)
"""


def upgrade() -> None:
    """
    The same index, of use to claims only.
    """
    op.execute("DROP INDEX outbox.events_claim_order")
    op.execute(f"{CLAIM_ORDER} WHERE available_at IS NOT NULL")


def downgrade() -> None:
    """
    As it was.
    """
    op.execute("DROP INDEX outbox.events_claim_order")
    op.execute(CLAIM_ORDER)

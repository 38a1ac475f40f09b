"""
${message}.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}

Safe migrations: expand, deploy, contract. Add columns nullable or with a constant default,
build indexes on filled tables with CREATE INDEX CONCURRENTLY, and in `public` revoke
everything before granting what is meant. Table changes must be reversible.
"""

from __future__ import annotations

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}

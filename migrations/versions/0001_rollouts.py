"""Rollouts, their history, and the overlays that they lay over routes."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("workload", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("holds", sa.String(255)),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("observed", sa.JSON),
        sa.Column("observed_at", sa.Float),
        sa.PrimaryKeyConstraint("id", name="pk_rollouts"),
        sa.UniqueConstraint("holds", name="uq_rollouts_holds"),
    )
    op.create_index("ix_rollouts_workload", "rollouts", ["workload"])
    op.create_table(
        "rollout_history",
        sa.Column("id", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("rollout_id", sa.String(64), nullable=False),
        sa.Column("workload", sa.String(255), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("who", sa.String(255), nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("from_state", sa.String(16)),
        sa.Column("to_state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("evidence", sa.JSON),
        sa.Column("config_snapshot", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rollout_history"),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name="fk_rollout_history_rollout_id_rollouts"),
    )
    op.create_index("ix_rollout_history_rollout_id", "rollout_history", ["rollout_id"])
    op.create_index("ix_rollout_history_workload", "rollout_history", ["workload"])
    op.create_table(
        "overlays",
        sa.Column("id", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("workload", sa.String(255), nullable=False),
        sa.Column("body", sa.JSON),
        sa.Column("rollout_id", sa.String(64), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("who", sa.String(255), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_overlays"),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name="fk_overlays_rollout_id_rollouts"),
    )
    op.create_index("ix_overlays_workload_id", "overlays", ["workload", "id"])


def downgrade() -> None:
    op.drop_table("overlays")
    op.drop_table("rollout_history")
    op.drop_table("rollouts")

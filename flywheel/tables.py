"""The flywheel's tables in the control database: runs and their stages, adapters, scores, cursors and leases."""

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, String, Table, Text

from routing.tables import metadata

__all__ = ["adapters", "cursors", "leases", "run_stages", "runs", "scores"]

runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workload", String(255), nullable=False, index=True),
    Column("state", String(16), nullable=False, index=True),
    Column("options", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("who", String(255), nullable=False),
    Column("error", Text, nullable=False),
    Column("version", Integer, nullable=False),
)

run_stages = Table(
    "run_stages",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("progress", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True)),
    Column("error", Text, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("workload", String(255), nullable=False, index=True),
    Column("run_id", String(64), ForeignKey("runs.id"), nullable=False),
    Column("model", String(255), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("manifest", JSON, nullable=False),
)

# What is known of a rollout's candidate, a row for each mirror that came back (kind `pair`) and for each of a client's
# exchanges that the candidate was asked to serve (kind `served`). `id` is the mirror's or the exchange's.
scores = Table(
    "scores",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("exchange_id", String(64), nullable=False),
    Column("rollout_id", String(64), nullable=False),
    Column("workload", String(255), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("at", Float, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("reason", Text, nullable=False),
    Index("ix_scores_rollout_id_at", "rollout_id", "at"),
)

cursors = Table(
    "cursors",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("value", Text, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(255), nullable=False),
    Column("expires_at", Float, nullable=False),
)

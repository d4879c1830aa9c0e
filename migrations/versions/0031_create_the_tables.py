"""Create the tables as revision 0031 had them, the first that is still upgraded.

A database of an older revision is first brought to this one by the loractl that schema.BASELINE names.
"""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = None
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_BY_BYTES = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Compared by bytes, as Python and SQLite compare."""

_TABLES = (
    "wishes",
    "tags",
    "shares",
    "outbox",
    "metrics",
    "looks",
    "log_chunks",
    "lab_failures",
    "job_labels",
    "events",
    "attempts",
    "adapters",
    "uses",
    "usage",
    "sweeps",
    "quotas",
    "nodes",
    "locks",
    "label_sets",
    "jobs",
    "hosts",
    "fleet_rounds",
    "drains",
)

_LOGIN = """
-- Whose word counts: the login's, where it is one of who submits. Null: what the client says.
CREATE FUNCTION loractl_login() RETURNS text LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF to_regrole('loractl_submit') IS NULL THEN
    RETURN NULL;
  END IF;
  RETURN CASE WHEN pg_has_role(session_user, 'loractl_submit', 'MEMBER') AND
    NOT pg_has_role(session_user, 'loractl_worker', 'MEMBER') THEN session_user END;
END $$
"""

_CHANGE = """
-- A person's change of one job, while its row still is what `expected` says; false when it is not. What a login may
-- change is asked of loractl_may_change, which loractl db roles makes.
CREATE FUNCTION loractl_change(number integer, kind text, expected jsonb, new json, who text, tail text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  said text := CASE kind WHEN 'cancel' THEN 'cancel asked for' WHEN 'retry' THEN 'queued again'
    WHEN 'held' THEN 'held' WHEN 'cancelled' THEN 'cancelled' WHEN 'edited' THEN 'edited' END;
  login text := loractl_login();
  columns text;
  before jobs;
  after jobs;
BEGIN
  said := said || ' by ' || coalesce(login, who) || tail;
  IF kind = 'cancel' THEN -- the row is its trainer's: it is not locked, and the next heartbeat reads the wish
    SELECT * INTO before FROM jobs WHERE job_id = number;
  ELSE
    SELECT * INTO before FROM jobs WHERE job_id = number FOR NO KEY UPDATE;
  END IF;
  IF before.job_id IS NULL OR said IS NULL OR EXISTS (SELECT FROM jsonb_each(expected) AS one
      WHERE to_jsonb(before) -> one.key IS DISTINCT FROM one.value) THEN
    RETURN false;
  END IF;
  IF kind = 'cancel' THEN
    IF before.status <> 'running' THEN
      RETURN false;
    END IF;
    INSERT INTO wishes (job_id, "user", at) VALUES (number, coalesce(login, who), clock_timestamp())
      ON CONFLICT DO NOTHING;
  ELSE
    after := json_populate_record(before, new);
    IF kind IN ('cancelled', 'held') THEN
      after.message := said;
    END IF;
    IF login IS NOT NULL THEN -- apart: a lab without roles has no such function
      IF loractl_may_change(before, after, kind) IS NOT TRUE THEN
        RAISE EXCEPTION 'only a worker may claim and end jobs, and only its own login edits a job'
          USING ERRCODE = 'insufficient_privilege';
      END IF;
    END IF;
    SELECT coalesce(string_agg(quote_ident(key), ', '), 'status') INTO columns FROM
      (SELECT json_object_keys(new) UNION SELECT 'message' WHERE kind IN ('cancelled', 'held')) AS named(key);
    EXECUTE format('UPDATE jobs SET (%s) = (SELECT %s FROM (SELECT ($1).*) AS wanted) WHERE job_id = $2',
      columns, columns) USING after, number;
    IF kind IN ('cancelled', 'retry') THEN
      DELETE FROM wishes WHERE job_id = number;
    END IF;
    IF after.labels::jsonb <> before.labels::jsonb THEN
      DELETE FROM job_labels WHERE job_id = number;
      INSERT INTO job_labels (job_id, key, value) SELECT number, key, value FROM json_each_text(after.labels);
    END IF;
  END IF;
  INSERT INTO events (job_id, attempt, at, kind, text) VALUES (number, NULL, clock_timestamp(), kind, said);
  RETURN true;
END $$
"""

_TAG = """
-- Let a tag mean this job's adapter (null: nothing), while it means that of `had` (null: it is not there); false when
-- it means another one by now.
CREATE FUNCTION loractl_tag(named text, its_tag text, number integer, had integer, who text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  teller text := ' by ' || coalesce(loractl_login(), who);
  current integer;
BEGIN
  SELECT job_id INTO current FROM tags WHERE name = named AND tag = its_tag FOR UPDATE;
  IF current IS DISTINCT FROM had OR
      number IS NOT NULL AND NOT EXISTS (SELECT FROM adapters WHERE job_id = number AND name = named) THEN
    RETURN false;
  END IF;
  IF number IS NULL THEN
    DELETE FROM tags WHERE name = named AND tag = its_tag;
    INSERT INTO events (job_id, attempt, at, kind, text)
      VALUES (had, NULL, clock_timestamp(), 'untagged', 'lost the tag ' || named || ':' || its_tag || teller);
    RETURN true;
  END IF;
  INSERT INTO tags (name, tag, job_id, "user", at)
    VALUES (named, its_tag, number, coalesce(loractl_login(), who), clock_timestamp())
    ON CONFLICT (name, tag) DO UPDATE SET job_id = excluded.job_id, "user" = excluded."user", at = excluded.at
    WHERE tags.job_id = had;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  IF number IS DISTINCT FROM had THEN
    INSERT INTO events (job_id, attempt, at, kind, text) VALUES (number, NULL, clock_timestamp(), 'tagged',
      'tagged ' || named || ':' || its_tag || coalesce(', which job ' || had || ' had', '') || teller);
  END IF;
  RETURN true;
END $$
"""

_FUNCTIONS = {
    "loractl_login()": _LOGIN,
    "loractl_change(integer, text, jsonb, json, text, text)": _CHANGE,
    "loractl_tag(text, text, integer, integer, text)": _TAG,
}


def upgrade() -> None:
    op.create_table(
        "drains",
        sa.Column("target", sa.String(length=255), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("until", _TIME, nullable=True),
        sa.Column("now", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("target"),
    )
    op.create_table(
        "fleet_rounds",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("settled_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "hosts",
        sa.Column("host", sa.String(length=32), nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("method", sa.String(length=8), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("leaving", sa.Boolean(), nullable=False),
        sa.Column("since", _TIME, nullable=False),
        sa.Column("open", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("law", sa.JSON(), nullable=True),
        sa.Column("spoilt", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("host"),
    )
    _index("ix_hosts_node", "hosts", ["node"])
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_hash", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("vram_lora", sa.BigInteger(), nullable=True),
        sa.Column("vram_qlora", sa.BigInteger(), nullable=True),
        sa.Column("vram_needed", sa.BigInteger(), nullable=True),
        sa.Column("vram_class", sa.Integer(), nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=24), nullable=False),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("stage", sa.String(length=24), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("held", sa.Boolean(), nullable=False),
        sa.Column("not_before", _TIME, nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("retries_used", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(length=32), nullable=True),
        sa.Column("lease_expires_at", _TIME, nullable=True),
        sa.Column("node", sa.String(length=255), nullable=True),
        sa.Column("gpu", sa.String(length=255), nullable=True),
        sa.Column("method", sa.String(length=8), nullable=True),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("total_steps", sa.Integer(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("tokens_per_second", sa.Double(), nullable=True),
        sa.Column("eta_seconds", sa.Double(), nullable=True),
        sa.Column("submitted_at", _TIME, nullable=False),
        sa.Column("started_at", _TIME, nullable=True),
        sa.Column("ended_at", _TIME, nullable=True),
        sa.Column("adapter_uri", sa.Text(), nullable=True),
        sa.Column("report_uri", sa.Text(), nullable=True),
        sa.Column("planned", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("queue_key", _BY_BYTES, server_default="", nullable=False),
        sa.Column("methods", sa.JSON(), server_default="[]", nullable=False),
        sa.Column("lora_until", _TIME, nullable=True),
        sa.Column("need_key", sa.String(length=64), nullable=True),
        sa.Column("family", sa.String(length=64), nullable=True),
        sa.Column("checkpoint", sa.JSON(), nullable=True),
        sa.Column("adjustment", sa.JSON(), nullable=True),
        sa.Column("vram_reserved", sa.BigInteger(), nullable=True),
        sa.Column("preemptible", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("preempted_by", sa.Integer(), nullable=True),
        sa.Column("version", sa.String(length=32), nullable=True),
        sa.Column("eta_spread_seconds", sa.Double(), nullable=True),
        sa.Column("sweep_id", sa.Integer(), nullable=True),
        sa.Column("result_host", sa.String(length=255), nullable=True),
        sa.Column("result_until", _TIME, nullable=True),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=True),
        sa.Column("lab_failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lab_step", sa.Integer(), nullable=True),
        sa.Column("avoids", sa.JSON(), nullable=True),
        sa.Column("engine", sa.Integer(), server_default="1", nullable=False),
        sa.Column("evaluated", sa.Integer(), nullable=True),
        sa.Column("to_evaluate", sa.Integer(), nullable=True),
        sa.Column("gangs", sa.JSON(), nullable=True),
        sa.Column("roomy", sa.JSON(), nullable=True),
        sa.Column("awaits", sa.Integer(), nullable=True),
        sa.Column("held_too", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("checkpoint_s", sa.Double(), nullable=True),
        sa.Column("ancestor", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("job_id"),
        sqlite_autoincrement=True,
    )
    _index("ix_jobs_base", "jobs", ["status", "base_model", "priority", "job_id"], where="status = 'queued'")
    _index("ix_jobs_class", "jobs", ["status", "vram_class"], where="status = 'queued'")
    _index("ix_jobs_ended", "jobs", ["ended_at", "status", "sweep_id", "job_id"], where="ended_at IS NOT NULL")
    _index("ix_jobs_family", "jobs", ["family", "job_id"], where="ended_at IS NOT NULL")
    _index("ix_jobs_lease", "jobs", ["lease_expires_at"], where="status = 'running'")
    _index("ix_jobs_line", "jobs", ["status", "queue_key", "job_id"], where="status = 'queued'")
    _index("ix_jobs_line_need", "jobs", ["status", "queue_key", "vram_needed"], where="status = 'queued'")
    _index("ix_jobs_line_user", "jobs", ["status", "priority", "user", "job_id"], where="status = 'queued'")
    _index("ix_jobs_name", "jobs", ["name", "job_id"])
    _index("ix_jobs_need_key", "jobs", ["need_key", "job_id"], where="attempt > 0")
    _index("ix_jobs_order", "jobs", ["status", "priority", "job_id"], where="status = 'queued'")
    _index("ix_jobs_outcome", "jobs", ["status", "reason"], where="ended_at IS NOT NULL")
    _index("ix_jobs_plan", "jobs", ["status", "base_model", "engine", "job_id"], where="status = 'queued'")
    _index("ix_jobs_status", "jobs", ["status", "job_id"])
    _index("ix_jobs_sweep", "jobs", ["sweep_id", "status", "ended_at"])
    _index("ix_jobs_user", "jobs", ["user", "job_id"])
    # of few jobs, and so made last: of indexes that it thinks equal, SQLite takes the newest
    _index("ix_jobs_awaits", "jobs", ["status", "awaits", "job_id"], where="status = 'queued' AND awaits IS NOT NULL")
    _index("ix_jobs_backoff", "jobs", ["status", "not_before"], where="status = 'queued' AND not_before IS NOT NULL")
    _index("ix_jobs_gangs", "jobs", ["status", "job_id"], where="status = 'queued' AND gangs IS NOT NULL")
    _index("ix_jobs_held", "jobs", ["status", "job_id"], where="status = 'queued' AND held")
    _index("ix_jobs_patience", "jobs", ["status", "lora_until"], where="status = 'queued' AND lora_until IS NOT NULL")
    op.create_table(
        "label_sets",
        sa.Column("label_set", sa.String(length=16), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("label_set"),
    )
    locks = op.create_table(
        "locks",
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "nodes",
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("gpu", sa.String(length=255), nullable=False),
        sa.Column("device_name", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("free", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("outside", sa.JSON(), nullable=False),
        sa.Column("load", sa.Integer(), nullable=True),
        sa.Column("temperature", sa.Integer(), nullable=True),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("seen_at", _TIME, nullable=False),
        sa.Column("outside_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("used", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("margin", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_jobs", sa.Integer(), server_default="1", nullable=False),
        sa.Column("user_limit", sa.Integer(), nullable=True),
        sa.Column("instance", sa.String(length=64), nullable=True),
        sa.Column("labels", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("fault", sa.Text(), nullable=True),
        sa.Column("self_test", sa.JSON(), nullable=True),
        sa.Column("machine", sa.String(length=64), nullable=True),
        sa.Column("boot", sa.String(length=64), nullable=True),
        sa.Column("gangs", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("until", _TIME, nullable=True),
        sa.Column("window_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("node"),
    )
    op.create_table(
        "quotas",
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("card_hours", sa.Double(), nullable=False),
        sa.Column("window_s", sa.Integer(), nullable=False),
        sa.Column("soft", sa.Boolean(), nullable=False),
        sa.Column("set_by", sa.String(length=255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("used", sa.Double(), nullable=False),
        sa.Column("below_at", _TIME, nullable=True),
        sa.PrimaryKeyConstraint("user"),
    )
    op.create_table(
        "sweeps",
        sa.Column("sweep_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("rungs", sa.JSON(), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("sweep_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "usage",
        sa.Column("hour", _TIME, nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("label_set", sa.String(length=16), nullable=False),
        sa.Column("card_hours", sa.Double(), nullable=False),
        sa.Column("gib_hours", sa.Double(), nullable=False),
        sa.Column("lost_hours", sa.Double(), nullable=False),
        sa.Column("waited_hours", sa.Double(), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "user", "node", "label_set"),
    )
    _index("ix_usage_user", "usage", ["user", "hour"])
    op.create_table(
        "uses",
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("gib_hours", sa.Double(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("user"),
    )
    op.create_table(
        "adapters",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("method", sa.String(length=8), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id"),
    )
    _index("ix_adapters_newest", "adapters", ["name", "created_at", "job_id"])
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("gpu", sa.String(length=255), nullable=False),
        sa.Column("method", sa.String(length=8), nullable=False),
        sa.Column("vram_planned", sa.BigInteger(), nullable=True),
        sa.Column("vram_reserved", sa.BigInteger(), nullable=True),
        sa.Column("vram_peak", sa.BigInteger(), nullable=True),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME, nullable=True),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("resumed_from_step", sa.Integer(), nullable=True),
        sa.Column("vram_allocated", sa.BigInteger(), nullable=True),
        sa.Column("vram_process", sa.BigInteger(), nullable=True),
        sa.Column("device_name", sa.String(length=255), nullable=True),
        sa.Column("device_kind", sa.String(length=8), nullable=True),
        sa.Column("engine", sa.Integer(), server_default="1", nullable=False),
        sa.Column("host", sa.String(length=32), nullable=True),
        sa.Column("inside", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("promised_at", _TIME, nullable=True),
        sa.Column("base_bytes", sa.BigInteger(), nullable=True),
        sa.Column("joined", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("shared", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("lease_expires_at", _TIME, nullable=True),
        sa.Column("roomy", sa.Boolean(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt"),
    )
    _index("ix_attempts_ended", "attempts", ["ended_at"])
    _index("ix_attempts_host", "attempts", ["host"], where="host IS NOT NULL")
    _index("ix_attempts_inside", "attempts", ["host"], where="host IS NOT NULL AND (ended_at IS NULL OR inside)")
    _index("ix_attempts_started", "attempts", ["started_at"])
    op.create_table(
        "events",
        sa.Column("event_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("event_id"),
    )
    _index("ix_events_job_id", "events", ["job_id"])
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=256), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    _index("ix_job_labels_jobs", "job_labels", ["key", "value", "job_id"])
    op.create_table(
        "lab_failures",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.String(length=24), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("sweep_id", sa.Integer(), nullable=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt"),
    )
    op.create_table(
        "log_chunks",
        sa.Column("chunk_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("chunk_id"),
    )
    _index("ix_log_chunks_job_id", "log_chunks", ["job_id"])
    op.create_table(
        "looks",
        sa.Column("look_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("sweep_id", sa.Integer(), nullable=True),
        sa.Column("rows_sha256", sa.String(length=64), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("look_id"),
    )
    _index("ix_looks_rows", "looks", ["rows_sha256", "look_id"])
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt", "step", "name"),
    )
    _index(
        "ix_metrics_final",
        "metrics",
        ["job_id", "name"],
        where="(name = 'held_out_loss' OR substr(name, 1, 5) = 'rung_')",
    )
    op.create_table(
        "outbox",
        sa.Column("message_id", sa.String(length=40), nullable=False),
        sa.Column("event", sa.String(length=255), nullable=False),
        sa.Column("channel", sa.String(length=64), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("token", sa.String(length=32), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("settled_at", _TIME, nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("message_id"),
    )
    _index("ix_outbox_at", "outbox", ["at"])
    _index("ix_outbox_due", "outbox", ["due_at"], where="settled_at IS NULL")
    _index("ix_outbox_job_id", "outbox", ["job_id"])
    _index("ux_outbox_event", "outbox", ["event", "channel"], unique=True)
    op.create_table(
        "shares",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("node", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt", "rank"),
    )
    _index("ix_shares_node", "shares", ["node"])
    op.create_table(
        "tags",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("tag", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", "tag"),
    )
    _index("ix_tags_job_id", "tags", ["job_id"])
    op.create_table(
        "wishes",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "user"),
    )
    op.bulk_insert(locks, [{"name": "fleet"}, {"name": "closing"}])  # others wait for a transaction that makes one
    if op.get_bind().dialect.name == "postgresql":
        for name, statement in _FUNCTIONS.items():
            op.get_bind().exec_driver_sql(statement.replace("%", "%%"))
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def _index(name: str, table: str, columns: list[str], *, where: str | None = None, unique: bool = False) -> None:
    part = None if where is None else sa.text(where)
    op.create_index(name, table, columns, unique=unique, sqlite_where=part, postgresql_where=part)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for name in reversed(_FUNCTIONS):
            op.execute(f"DROP FUNCTION {name}")
    for table in _TABLES:
        op.drop_table(table)

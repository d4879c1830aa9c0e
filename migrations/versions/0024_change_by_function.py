"""Wishes next to the jobs' rows, locks that only workers can take, and people's changes by functions (revision 0024).

A login that submits has no UPDATE and no DELETE then, and so can't lock a row for longer than such a function runs.
"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

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
    locks = op.create_table("locks", sa.Column("name", sa.String(300), primary_key=True))
    op.bulk_insert(locks, [{"name": "fleet"}, {"name": "closing"}])  # others wait for a transaction that makes one
    op.create_table(
        "wishes",
        sa.Column("job_id", sa.Integer(), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), nullable=False),
        sa.Column("user", sa.String(255), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "user"),
    )
    op.add_column("attempts", sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        for name, statement in _FUNCTIONS.items():
            op.get_bind().exec_driver_sql(statement.replace("%", "%%"))
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for name in reversed(_FUNCTIONS):
            op.execute(f"DROP FUNCTION {name}")
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("lease_expires_at")
    op.drop_table("wishes")
    op.drop_table("locks")

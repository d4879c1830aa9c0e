"""Rows of people are written by functions, and numbers drawn from sequences have 64 bits (revision 0036).

SQLite's numbers have 64 bits in any case.
"""

from alembic import op

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None

_NUMBERS = {
    "jobs": ("job_id", "awaits", "ancestor", "preempted_by", "sweep_id"),
    "sweeps": ("sweep_id",),
    "events": ("event_id", "job_id"),
    "log_chunks": ("chunk_id", "job_id"),
    "looks": ("look_id", "job_id", "sweep_id"),
    **dict.fromkeys(
        (
            "adapters",
            "attempts",
            "hosts",
            "job_labels",
            "lab_failures",
            "metrics",
            "outbox",
            "shares",
            "tags",
            "wishes",
        ),
        ("job_id",),
    ),
}
_SEQUENCES = (
    "jobs_job_id_seq", "sweeps_sweep_id_seq", "events_event_id_seq", "log_chunks_chunk_id_seq", "looks_look_id_seq",
)  # fmt: skip

_SUBMIT = """
-- Write a job that waits, with its labels and the first line of its history, or a sweep; returns its number.
-- What a login may write is asked of loractl_is_new, which loractl db roles makes.
CREATE FUNCTION loractl_submit(document json) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  login text := loractl_login();
  asked json := document -> 'job';
  told timestamptz := clock_timestamp();
  who text;
  job jobs;
  group_of_jobs sweeps;
BEGIN
  IF octet_length(document::text) > 1048576 THEN
    RAISE EXCEPTION 'a job has more than 1 MiB' USING ERRCODE = 'LR005';
  END IF;
  IF asked IS NULL THEN
    IF login IS NOT NULL AND (SELECT count(*) FROM
        (SELECT "user", created_at FROM sweeps ORDER BY sweep_id DESC LIMIT 20000) AS newest
        WHERE "user" = login AND created_at > told - interval '1 day') >= 2000 THEN
      RAISE EXCEPTION '% has made 2,000 sweeps within a day', login USING ERRCODE = 'LR005';
    END IF;
    group_of_jobs := json_populate_record(NULL::sweeps, document -> 'sweep');
    INSERT INTO sweeps (name, "user", settings, rungs, created_at) VALUES (group_of_jobs.name,
      coalesce(login, group_of_jobs."user"), group_of_jobs.settings, group_of_jobs.rungs,
      CASE WHEN login IS NULL THEN group_of_jobs.created_at ELSE told END)
      RETURNING sweep_id INTO group_of_jobs.sweep_id;
    RETURN group_of_jobs.sweep_id;
  END IF;
  IF login IS NOT NULL AND told - interval '1 day' <
      (SELECT submitted_at FROM jobs WHERE "user" = login ORDER BY job_id DESC OFFSET 19999 LIMIT 1) THEN
    RAISE EXCEPTION '% has queued 20,000 jobs within a day', login USING ERRCODE = 'LR005';
  END IF;
  job := json_populate_record(NULL::jobs, asked);
  who := job."user";
  job.job_id := nextval('jobs_job_id_seq');
  job.attempt := coalesce(job.attempt, 0);
  job.retries_used := coalesce(job.retries_used, 0);
  job.lab_failures := coalesce(job.lab_failures, 0);
  job.cancel_requested := coalesce(job.cancel_requested, false);
  job.preemptible := coalesce(job.preemptible, false);
  job.held := coalesce(job.held, false);
  job.held_too := coalesce(job.held_too, false);
  IF login IS NOT NULL THEN -- apart: a lab without roles has no such function
    IF loractl_is_new(job) IS NOT TRUE THEN
      RAISE EXCEPTION 'only a worker may claim and end jobs' USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM loractl_pending.refuse_levels(login, job.priority);
    job.queue_key := left(job.queue_key, -length(who)) || login;
    job."user" := login;
    job.submitted_at := told;
    who := who || CASE WHEN who = login THEN '' ELSE ' (login ' || login || ')' END;
  ELSE
    told := job.submitted_at;
  END IF;
  INSERT INTO jobs SELECT (job).*;
  INSERT INTO job_labels (job_id, key, value) SELECT job.job_id, key, value FROM json_each_text(job.labels);
  INSERT INTO events (job_id, attempt, at, kind, text) VALUES (job.job_id, NULL, told, 'queued',
    'queued by ' || who || coalesce(substring(left(translate(document ->> 'why', E'\\n\\r', '  '), 2000)
      FROM '^(?:, | as a member of sweep ).*'), '')); -- nothing makes the name longer
  RETURN job.job_id;
END $$
"""

_LOOK = """
-- Write down that somebody is shown what a job measured on its final rows; returns the look's number.
CREATE FUNCTION loractl_look(number bigint, rows text, who text, at timestamptz) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  login text := loractl_login();
  sweep bigint;
  look bigint;
BEGIN
  SELECT sweep_id INTO sweep FROM jobs WHERE job_id = number AND (login IS NULL OR status = 'succeeded');
  IF NOT FOUND THEN
    RAISE EXCEPTION 'only a result can be looked at' USING ERRCODE = 'insufficient_privilege';
  END IF;
  IF login IS NOT NULL AND (SELECT count(*) FROM (SELECT FROM looks WHERE "user" = login AND
      looks.at > clock_timestamp() - interval '1 day' LIMIT 2000) AS recent) = 2000 THEN
    RAISE EXCEPTION '% has looked at final rows 2,000 times within a day', login
      USING ERRCODE = 'LR005';
  END IF;
  INSERT INTO looks (job_id, sweep_id, rows_sha256, "user", at) VALUES (number, sweep, left(rows, 64),
    coalesce(login, who), CASE WHEN login IS NULL THEN loractl_look.at ELSE clock_timestamp() END)
    RETURNING look_id INTO look;
  RETURN look;
END $$
"""

_FUNCTIONS = {"loractl_submit(json)": _SUBMIT, "loractl_look(bigint, text, text, timestamptz)": _LOOK}


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    _alter("bigint")
    for name, statement in _FUNCTIONS.items():
        op.get_bind().exec_driver_sql(statement.replace("%", "%%"))
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for name in _FUNCTIONS:
        op.execute(f"DROP FUNCTION {name}")
    _alter("integer")


def _alter(kind: str) -> None:
    for table, columns in _NUMBERS.items():
        op.execute(f"ALTER TABLE {table} {', '.join(f'ALTER COLUMN {column} TYPE {kind}' for column in columns)}")
    for sequence in _SEQUENCES:
        op.execute(f"ALTER SEQUENCE {sequence} AS {kind}")

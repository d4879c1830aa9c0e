"""People's changes are made by COMMIT: an open transaction locks no row that workers wait for (revision 0035)."""

import importlib
from collections.abc import Iterable

from alembic import op

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None

_PENDING = (
    "CREATE SCHEMA loractl_pending",
    # not logged: no row outlives its transaction
    """
    CREATE UNLOGGED TABLE loractl_pending.changes (
      tx xid8 NOT NULL, nth integer NOT NULL, first boolean NOT NULL, kind text NOT NULL, job_id bigint,
      expected jsonb NOT NULL, new json NOT NULL, who text NOT NULL, tail text NOT NULL, size bigint NOT NULL,
      PRIMARY KEY (tx, nth)
    )
    """,
)

_LOGIN = """
-- Whose word counts: the login's, where it is not the owner's. Null: what the client says.
CREATE FUNCTION loractl_login() RETURNS text LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF to_regrole('loractl_submit') IS NULL THEN
    RETURN NULL;
  END IF;
  RETURN (SELECT CASE WHEN NOT pg_has_role(session_user, relowner, 'MEMBER') THEN session_user END
    FROM pg_class WHERE oid = 'public.jobs'::regclass);
END $$
"""

_SAID = """
-- One line, in which nothing makes the name longer
CREATE FUNCTION loractl_pending.said(asked loractl_pending.changes) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT CASE asked.kind WHEN 'cancel' THEN 'cancel asked for' WHEN 'retry' THEN 'queued again' WHEN 'held' THEN 'held'
    WHEN 'cancelled' THEN 'cancelled' WHEN 'edited' THEN 'edited' END || ' by ' || asked.who ||
    CASE WHEN asked.tail ~ '^(: |$)' THEN '' ELSE ': ' END || translate(asked.tail, E'\\n\\r', '  ')
$$
"""

_REFUSE_FLOOD = """
CREATE FUNCTION loractl_pending.refuse_flood(number bigint) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF loractl_login() IS NOT NULL AND (SELECT count(*) FROM (SELECT FROM events WHERE job_id = number AND
      attempt IS NULL AND at > clock_timestamp() - interval '1 day' LIMIT 500) AS told) = 500 THEN
    RAISE EXCEPTION 'people have changed job % 500 times within a day', number
      USING ERRCODE = 'LR005';
  END IF;
END $$
"""

_REFUSE_LEVELS = """
-- A claim reads each priority by itself: thousands of them, whose jobs fit nowhere, would make it last for seconds.
CREATE FUNCTION loractl_pending.refuse_levels(whose text, another integer) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp SET enable_seqscan = off SET enable_indexscan = on
SET enable_indexonlyscan = on AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM jobs WHERE status = 'queued' AND priority = another AND "user" = whose) AND (
      WITH RECURSIVE levels(p) AS (
        SELECT max(priority) FROM jobs WHERE status = 'queued'
        UNION ALL
        SELECT (SELECT max(priority) FROM jobs WHERE status = 'queued' AND priority < levels.p) FROM levels
        WHERE levels.p IS NOT NULL)
      SELECT count(*) FROM levels
      WHERE EXISTS (SELECT FROM jobs WHERE status = 'queued' AND priority = levels.p AND "user" = whose)) >= 10 THEN
    RAISE EXCEPTION '%''s waiting jobs have 10 different priorities already, none of them is %', whose, another
      USING ERRCODE = 'LR005';
  END IF;
END $$
"""

_WANTED = """
-- What a change makes of the row; null where the row is not as expected. Raises where the login may not.
CREATE FUNCTION loractl_pending.wanted(before jobs, asked loractl_pending.changes) RETURNS jobs LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  after jobs := before;
  found jsonb := to_jsonb(before);
BEGIN
  IF before.job_id IS NULL OR asked.kind = 'cancel' AND before.status <> 'running' OR
      EXISTS (SELECT FROM jsonb_each(asked.expected) AS one WHERE found -> one.key IS DISTINCT FROM one.value) THEN
    RETURN NULL;
  END IF;
  PERFORM loractl_pending.refuse_flood(before.job_id);
  IF asked.kind = 'cancel' THEN
    RETURN before;
  END IF;
  after := json_populate_record(before, asked.new);
  IF asked.kind IN ('cancelled', 'held') THEN
    after.message := loractl_pending.said(asked);
  END IF;
  IF loractl_login() IS NOT NULL THEN -- apart: a lab without roles has no such function
    IF loractl_may_change(before, after, asked.kind) IS NOT TRUE THEN
      RAISE EXCEPTION 'only a worker may claim and end jobs, and only its own login edits a job'
        USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF after.status = 'queued' THEN
      PERFORM loractl_pending.refuse_levels(after."user", after.priority);
    END IF;
  END IF;
  RETURN after;
END $$
"""

_CARRY_OUT = """
CREATE FUNCTION loractl_pending.carry_out(asked loractl_pending.changes) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  before jobs;
  after jobs;
  columns text;
BEGIN
  IF asked.kind = 'cancel' THEN -- the row is its trainer's: it is not locked, and the next heartbeat reads the wish
    SELECT * INTO before FROM jobs WHERE job_id = asked.job_id;
  ELSE
    SELECT * INTO before FROM jobs WHERE job_id = asked.job_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM jobs WHERE job_id = asked.job_id) THEN
      RAISE EXCEPTION 'job % is locked', asked.job_id USING ERRCODE = 'LR002', DETAIL = asked.job_id;
    END IF;
  END IF;
  after := loractl_pending.wanted(before, asked);
  IF after.job_id IS NULL THEN
    RAISE EXCEPTION 'job % has changed meanwhile', asked.job_id USING ERRCODE = 'LR001', DETAIL = asked.job_id;
  END IF;
  IF asked.kind = 'cancel' THEN
    INSERT INTO wishes (job_id, "user", at) VALUES (asked.job_id, asked.who, clock_timestamp()) ON CONFLICT DO NOTHING;
  ELSE
    SELECT coalesce(string_agg(quote_ident(key), ', '), 'status') INTO columns FROM
      (SELECT json_object_keys(asked.new) UNION SELECT 'message' WHERE asked.kind IN ('cancelled', 'held')) AS n(key);
    EXECUTE format('UPDATE jobs SET (%s) = (SELECT %s FROM (SELECT ($1).*) AS wanted) WHERE job_id = $2',
      columns, columns) USING after, asked.job_id;
    IF asked.kind IN ('cancelled', 'retry') THEN
      DELETE FROM wishes WHERE job_id = asked.job_id;
    END IF;
    IF after.labels::jsonb <> before.labels::jsonb THEN
      DELETE FROM job_labels WHERE job_id = asked.job_id;
      INSERT INTO job_labels (job_id, key, value) SELECT asked.job_id, key, value FROM json_each_text(after.labels);
    END IF;
  END IF;
  INSERT INTO events (job_id, attempt, at, kind, text)
    VALUES (asked.job_id, NULL, clock_timestamp(), asked.kind, loractl_pending.said(asked));
END $$
"""

_SET_TAG = """
-- Let a tag mean this job's adapter (null: nothing), while it means that of `had` (null: it is not there).
CREATE FUNCTION loractl_pending.set_tag(asked loractl_pending.changes) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  named text := asked.expected ->> 'name';
  its_tag text := asked.expected ->> 'tag';
  had bigint := (asked.expected ->> 'had')::bigint;
  about bigint := coalesce(asked.job_id, had);
  teller text := ' by ' || asked.who;
BEGIN
  IF asked.job_id IS NULL THEN
    DELETE FROM tags WHERE name = named AND tag = its_tag AND job_id = had;
  ELSE
    INSERT INTO tags (name, tag, job_id, "user", at) SELECT named, its_tag, asked.job_id, asked.who, clock_timestamp()
      WHERE had IS NULL OR EXISTS (SELECT FROM tags WHERE name = named AND tag = its_tag)
      ON CONFLICT (name, tag) DO UPDATE SET job_id = excluded.job_id, "user" = excluded."user", at = excluded.at
      WHERE tags.job_id = had;
  END IF;
  IF NOT FOUND THEN
    RAISE EXCEPTION '%:% has changed meanwhile', named, its_tag USING ERRCODE = 'LR001', DETAIL = about;
  END IF;
  IF asked.job_id IS NULL THEN
    INSERT INTO events (job_id, attempt, at, kind, text)
      VALUES (had, NULL, clock_timestamp(), 'untagged', 'lost the tag ' || named || ':' || its_tag || teller);
  ELSIF asked.job_id IS DISTINCT FROM had THEN
    INSERT INTO events (job_id, attempt, at, kind, text) VALUES (asked.job_id, NULL, clock_timestamp(), 'tagged',
      'tagged ' || named || ':' || its_tag || coalesce(', which job ' || had || ' had', '') || teller);
  END IF;
END $$
"""

_BY_COMMIT = """
-- Makes all changes of the transaction, by COMMIT alone: then no lock of theirs outlives the call. What could stretch
-- that moment is refused or fixed: a cursor that COMMIT has to read to its end, the login's settings, messages
-- to a client that reads none. An error gives the locks back before the client is told.
CREATE FUNCTION loractl_pending.by_commit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp SET extra_float_digits = 1 SET jit = off
SET enable_seqscan = off SET enable_indexscan = on SET enable_indexonlyscan = on SET random_page_cost = 1.1
SET cpu_index_tuple_cost = 0.005 SET cpu_operator_cost = 0.0025 SET plan_cache_mode = auto
SET debug_print_parse = off SET debug_print_rewritten = off SET debug_print_plan = off AS $$
DECLARE
  began timestamptz := clock_timestamp();
  asked loractl_pending.changes;
  refused text;
  state text;
  about text;
BEGIN
  IF current_query() IS DISTINCT FROM 'COMMIT' OR current_setting('transaction_isolation') <> 'read committed' OR
      EXISTS (SELECT FROM pg_cursors WHERE is_holdable) THEN
    RAISE EXCEPTION 'changes are made by the statement COMMIT alone, at READ COMMITTED, without a cursor WITH HOLD'
      USING ERRCODE = 'LR003';
  END IF;
  -- to the transaction's end: NOTIFY takes a lock of the whole server after this function
  PERFORM set_config('client_min_messages', 'error', true), set_config('lock_timeout', '300ms', true);
  BEGIN
    FOR asked IN SELECT * FROM loractl_pending.changes WHERE tx = NEW.tx ORDER BY nth LOOP
      IF asked.kind = 'tag' THEN
        PERFORM loractl_pending.set_tag(asked);
      ELSE
        PERFORM loractl_pending.carry_out(asked);
      END IF;
      IF clock_timestamp() > began + interval '1 second' THEN
        RAISE EXCEPTION 'one transaction makes too many changes: % took a second', asked.nth
          USING ERRCODE = 'LR005';
      END IF;
    END LOOP;
    DELETE FROM loractl_pending.changes WHERE tx = NEW.tx;
  EXCEPTION WHEN query_canceled OR OTHERS THEN
    GET STACKED DIAGNOSTICS refused = MESSAGE_TEXT, state = RETURNED_SQLSTATE, about = PG_EXCEPTION_DETAIL;
  END;
  IF state = '55P03' THEN -- a lock that it could not have in time
    state := 'LR002';
    about := coalesce(asked.job_id::text, asked.expected ->> 'had');
  END IF;
  IF state IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = refused, ERRCODE = state, DETAIL = about;
  END IF;
  RETURN NULL;
END $$
"""

_TRIGGER = """
CREATE CONSTRAINT TRIGGER by_commit AFTER INSERT ON loractl_pending.changes DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW WHEN (NEW.first) EXECUTE FUNCTION loractl_pending.by_commit()
"""

_ASK = """
CREATE FUNCTION loractl_pending.ask(asked loractl_pending.changes) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  last loractl_pending.changes;
BEGIN
  SELECT * INTO last FROM loractl_pending.changes WHERE tx = pg_current_xact_id() ORDER BY nth DESC LIMIT 1;
  asked.size := coalesce(last.size, 0) + octet_length(asked.new::text) + octet_length(asked.expected::text) +
    octet_length(asked.tail) + octet_length(asked.who);
  IF last.nth >= 2000 OR asked.size > 16777216 THEN
    RAISE EXCEPTION 'one transaction makes at most 2,000 changes, of 16 MiB' USING ERRCODE = 'LR005';
  END IF;
  INSERT INTO loractl_pending.changes (tx, nth, first, kind, job_id, expected, new, who, tail, size)
    VALUES (pg_current_xact_id(), coalesce(last.nth, 0) + 1, last.nth IS NULL, asked.kind, asked.job_id, asked.expected,
      asked.new, asked.who, asked.tail, asked.size);
END $$
"""

_CHANGE = """
-- A person's change of one job, which COMMIT makes while the row still is as `expected`; false when it is not now.
-- What a login may change is asked of loractl_may_change, which loractl db roles makes.
CREATE FUNCTION loractl_change(number bigint, kind text, expected jsonb, new json, who text, tail text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  asked loractl_pending.changes;
  before jobs;
BEGIN
  asked.kind := kind;
  asked.job_id := number;
  asked.expected := expected;
  asked.new := new;
  asked.who := left(coalesce(loractl_login(), who), 255);
  asked.tail := left(tail, 2000);
  IF loractl_pending.said(asked) IS NULL THEN
    RETURN false;
  END IF;
  IF number IS DISTINCT FROM (SELECT job_id FROM loractl_pending.changes WHERE tx = pg_current_xact_id()
      ORDER BY nth DESC LIMIT 1) THEN -- else this transaction changes it already, and COMMIT compares
    SELECT * INTO before FROM jobs WHERE job_id = number;
    before := loractl_pending.wanted(before, asked);
    IF before.job_id IS NULL THEN
      RETURN false;
    END IF;
  END IF;
  PERFORM loractl_pending.ask(asked);
  RETURN true;
END $$
"""

_TAG = """
-- The same for a tag: let it mean this job's adapter (null: nothing), while it means that of `had` (null: none).
CREATE FUNCTION loractl_tag(named text, its_tag text, number bigint, had bigint, who text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  asked loractl_pending.changes;
BEGIN
  IF (SELECT job_id FROM tags WHERE name = named AND tag = its_tag) IS DISTINCT FROM had OR
      number IS NULL AND had IS NULL OR
      number IS NOT NULL AND NOT EXISTS (SELECT FROM adapters WHERE job_id = number AND name = named) THEN
    RETURN false;
  END IF;
  IF number IS NOT NULL AND (its_tag !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$' OR its_tag = 'latest') THEN
    RAISE EXCEPTION '% is not a tag that a person can give', quote_literal(left(its_tag, 64))
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  PERFORM loractl_pending.refuse_flood(coalesce(number, had));
  asked.kind := 'tag';
  asked.job_id := number;
  asked.expected := jsonb_build_object('name', named, 'tag', its_tag, 'had', had);
  asked.new := '{}';
  asked.who := left(coalesce(loractl_login(), who), 255);
  asked.tail := '';
  PERFORM loractl_pending.ask(asked);
  RETURN true;
END $$
"""

_FUNCTIONS = {
    "loractl_login()": _LOGIN,
    "loractl_change(bigint, text, jsonb, json, text, text)": _CHANGE,
    "loractl_tag(text, text, bigint, bigint, text)": _TAG,
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        _drop(_functions_of_0031())
        inner = (_SAID, _REFUSE_FLOOD, _REFUSE_LEVELS, _WANTED, _CARRY_OUT, _SET_TAG, _BY_COMMIT, _TRIGGER, _ASK)
        _make((*_PENDING, *inner), _FUNCTIONS)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP SCHEMA loractl_pending CASCADE")
        _drop(_FUNCTIONS)
        _make((), _functions_of_0031())


def _make(others: Iterable[str], functions: dict[str, str]) -> None:
    for statement in (*others, *functions.values()):
        op.get_bind().exec_driver_sql(statement.replace("%", "%%"))
    for name in functions:
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def _drop(functions: dict[str, str]) -> None:
    for name in reversed(functions):
        op.execute(f"DROP FUNCTION {name}")


def _functions_of_0031() -> dict[str, str]:
    earlier = importlib.import_module("loractl.migrations.versions.0031_create_the_tables")
    return dict(earlier._FUNCTIONS)

-- The roles of a lab, what each may do, and the rules that hold submitters to it. loractl db roles runs all of
-- this in one transaction, and again after each upgrade: a line that ran before changes nothing.

DO $$ BEGIN
  IF to_regrole('loractl_submit') IS NULL THEN CREATE ROLE loractl_submit NOLOGIN; END IF;
  IF to_regrole('loractl_worker') IS NULL THEN CREATE ROLE loractl_worker NOLOGIN; END IF;
  IF to_regrole('loractl_web') IS NULL THEN CREATE ROLE loractl_web NOLOGIN; END IF; -- loractl web: it only reads
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
-- Nothing of loractl's needs temporary tables, large objects or advisory locks: a login could fill the disk with them,
-- and the server's table of locks.
DO $$ DECLARE
  its regprocedure;
  other name;
  its_login name;
BEGIN
  EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO loractl_submit, loractl_worker, loractl_web', current_database());
  IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN -- these functions are the superuser's
    REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;
    FOR its IN SELECT oid FROM pg_proc WHERE proname ~ '^pg_(try_)?advisory_' AND pronamespace = 'pg_catalog'::regnamespace LOOP
      EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', its);
    END LOOP;
    -- Nor in the server's own databases: its table of locks is one for all of them. Who could connect still can.
    FOR other IN SELECT datname FROM pg_database WHERE datname IN ('postgres', 'template1') AND
        datname <> current_database() AND has_database_privilege('public', oid, 'CONNECT') LOOP
      FOR its_login IN SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper AND rolname !~ '^loractl_join_' AND
          NOT EXISTS (SELECT FROM pg_auth_members WHERE member = pg_roles.oid AND
            roleid IN (to_regrole('loractl_submit'), to_regrole('loractl_worker'), to_regrole('loractl_web'))) LOOP
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', other, its_login);
      END LOOP;
      EXECUTE format('REVOKE CONNECT ON DATABASE %I FROM PUBLIC', other);
    END LOOP;
    IF to_regrole('pg_use_reserved_connections') IS NOT NULL THEN -- PostgreSQL 16: others use up the rest alone
      GRANT pg_use_reserved_connections TO loractl_worker;
    END IF;
  END IF;
END $$;
-- The same by sorting what it may read. Only a superuser may bound that; what the owner has set stays, and the owner's
-- sessions have no bound: an index is built by sorting.
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_db_role_setting JOIN pg_database ON setdatabase = pg_database.oid,
      unnest(setconfig) AS one
      WHERE datname = current_database() AND setrole = 0 AND starts_with(one, 'temp_file_limit=')) THEN
    EXECUTE format('ALTER DATABASE %I SET temp_file_limit = ''1GB''', current_database());
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET temp_file_limit = -1', current_user, current_database());
  END IF;
EXCEPTION WHEN insufficient_privilege THEN
  NULL; -- loractl doctor says so
END $$;
-- Take away what an earlier version, or somebody by hand, has granted them; nobody sees the moment between.
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM loractl_submit, loractl_worker, loractl_web;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM loractl_submit, loractl_worker, loractl_web;
GRANT USAGE ON SCHEMA public TO loractl_submit, loractl_worker, loractl_web;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO loractl_submit, loractl_worker, loractl_web;

-- submit and sweep, and all that only reads. No right to write a table, or to draw a number: with them a login could
-- lock rows and tables, write what no client would, or use numbers up. Functions write for it: loractl_submit a new job,
-- loractl_change and loractl_tag what a person does to one that is there, loractl_look a look at final rows.
GRANT EXECUTE ON FUNCTION loractl_submit(json) TO loractl_submit;
GRANT EXECUTE ON FUNCTION loractl_login(), loractl_change(bigint, text, jsonb, json, text, text),
  loractl_tag(text, text, bigint, bigint, text), loractl_look(bigint, text, text, timestamptz)
  TO loractl_submit, loractl_worker;

-- worker, gc, adapters bind, drain and undrain: everything of a job's row but what was asked, and by whom. A job that
-- gives way keeps to one of its methods; a claim takes none that its job file doesn't permit.
GRANT UPDATE (status, reason, message, stage, preempted_by, stops, held, not_before, retries_used, ended_at,
    awaits, ancestor,
    token, lease_expires_at, step, total_steps, loss, tokens_per_second, eta_seconds, eta_spread_seconds, evaluated,
    to_evaluate, attempt,
    node, gpu, method, methods, started_at, vram_reserved, vram_lora, vram_qlora, vram_needed, vram_class, planned, need_key,
    family, engine, queue_key, lora_until, checkpoint, adjustment, adapter_uri, report_uri, result_host, result_until,
    manifest_sha256, lab_failures, lab_step, avoids, gangs, roomy, checkpoint_s, begun_bf16, forecasts, work_left_s)
    ON jobs TO loractl_worker;
GRANT INSERT, UPDATE ON attempts, contentions, uses, usage, fleet_rounds, locks TO loractl_worker;
GRANT UPDATE (used, below_at) ON quotas TO loractl_worker; -- the owner alone sets one
GRANT DELETE ON wishes TO loractl_worker;
GRANT INSERT, UPDATE, DELETE ON nodes, drains, tags, outbox, kept_files TO loractl_worker;
GRANT INSERT ON events, metrics, shares, label_sets TO loractl_worker;
GRANT INSERT, DELETE ON log_chunks, adapters, lab_failures TO loractl_worker;
GRANT USAGE ON SEQUENCE events_event_id_seq, log_chunks_chunk_id_seq TO loractl_worker;

-- A submitter writes no row that has a history or that workers can't read, and changes one as cancel, hold, retry and
-- edit do. Anybody cancels, holds, retries and tags; only a job's own login changes what is asked of it. The person is
-- the login, whatever the client says. The search path is fixed: else a login's temporary table or sequence would be
-- taken for jobs or its numbers.
CREATE OR REPLACE FUNCTION loractl_readable(job jobs) RETURNS boolean LANGUAGE sql
SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT job.priority BETWEEN -1000 AND 1000 AND
    left(job.queue_key, 5) = lpad((10000 - job.priority)::text, 5, '0') AND
    substring(job.queue_key FROM '^[0-9]{5}[|][^|]*[|][^|]*[|](.*)$') = job."user" AND
    coalesce(job.lora_until, now()) BETWEEN now() - interval '1 day' AND now() + interval '100 years';
$$;
CREATE OR REPLACE FUNCTION loractl_same_batch(job jobs) RETURNS boolean LANGUAGE plpgsql -- in other pieces: reproduce
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  pieces jsonb := job.adjustment;
  asked json := job.spec -> 'training';
  count text := '^[1-9][0-9]{0,9}$';
BEGIN
  RETURN coalesce(jsonb_typeof(pieces), 'null') = 'null' OR
    jsonb_typeof(pieces) = 'object' AND
    pieces - '{micro_batch,accumulation,eval_batch,gradient_checkpointing}'::text[] = '{}' AND
    jsonb_typeof(coalesce(pieces -> 'gradient_checkpointing', 'true')) = 'boolean' AND
    coalesce(pieces -> 'eval_batch', '1')::text ~ count AND
    CASE WHEN NOT pieces ?| '{micro_batch,accumulation}' THEN true
      WHEN (pieces -> 'micro_batch')::text ~ count AND (pieces -> 'accumulation')::text ~ count THEN
        (pieces ->> 'micro_batch')::bigint * (pieces ->> 'accumulation')::bigint =
          (asked ->> 'per_device_train_batch_size')::bigint * (asked ->> 'gradient_accumulation_steps')::bigint
      ELSE false END;
END $$;
CREATE OR REPLACE FUNCTION loractl_may_edit(before jobs, after jobs) RETURNS boolean LANGUAGE sql
SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT before.status <> 'succeeded' AND loractl_readable(after) AND coalesce(after.awaits, 0) < after.job_id AND
    after.spec ->> 'name' = after.name AND after.spec ->> 'base_model' = after.base_model AND
    (after.checkpoint_s IS NULL OR after.checkpoint_s = before.checkpoint_s) AND
    (after.begun_bf16 IS NULL OR after.begun_bf16 = before.begun_bf16) AND
    (after.adjustment::text IS NOT DISTINCT FROM before.adjustment::text OR
      coalesce(after.adjustment::text, 'null') = 'null') AND
    (after.spec::text = before.spec::text OR loractl_same_batch(after)) AND
    (before.status <> 'running' OR after.awaits IS NOT DISTINCT FROM before.awaits AND
      after.spec::jsonb - '{priority,labels,resources,preemptible}'::text[] =
        before.spec::jsonb - '{priority,labels,resources,preemptible}'::text[] AND
      (after.methods::text, after.vram_lora, after.vram_qlora, after.adjustment::text) IS NOT DISTINCT FROM
        (before.methods::text, before.vram_lora, before.vram_qlora, before.adjustment::text));
$$;
-- Whether a person may change a row like this; loractl_change asks. Every column not named here stays as it was.
CREATE OR REPLACE FUNCTION loractl_may_change(before jobs, after jobs, kind text) RETURNS boolean LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  columns text[] := CASE kind
    WHEN 'cancelled' THEN '{status,reason,message,held,ended_at}'
    WHEN 'held' THEN '{message,held}'
    WHEN 'retry' THEN '{status,reason,message,held,ended_at,not_before,retries_used,step,total_steps,loss,
      tokens_per_second,lab_failures,lab_step,avoids,result_until}'
    WHEN 'edited' THEN '{name,labels,spec,priority,methods,preemptible,yields,version,vram_lora,
      awaits,checkpoint_s,begun_bf16,extent,forecasts,work_left_s,
      vram_qlora,vram_needed,vram_class,planned,need_key,family,engine,queue_key,lora_until,adjustment,gangs,roomy}'
    END;
BEGIN
  IF columns IS NULL OR to_jsonb(before) - columns <> to_jsonb(after) - columns THEN
    RETURN false;
  END IF;
  RETURN CASE kind
    WHEN 'cancelled' THEN before.status = 'queued' AND after.status = 'cancelled' AND after.reason = 'cancelled' AND
      NOT after.held AND
      coalesce(after.ended_at, 'infinity') BETWEEN now() - interval '1 day' AND now() + interval '1 day'
    WHEN 'held' THEN before.status = 'queued' AND after.held
    WHEN 'retry' THEN (before.status IN ('failed', 'cancelled') OR before.status = 'queued' AND before.held) AND
      after.status = 'queued' AND NOT after.held AND
      after.retries_used = 0 AND after.lab_failures = 0 AND
      concat(after.reason, after.message, after.ended_at, after.not_before, after.step, after.total_steps, after.loss,
        after.tokens_per_second, after.lab_step, nullif(after.avoids::text, 'null')) = '' AND
      coalesce(after.result_until, now()) BETWEEN now() - interval '1 day' AND now() + interval '1 day'
    ELSE loractl_may_edit(before, after) END;
END $$;
-- Whether a person may write a job like this; loractl_submit asks.
CREATE OR REPLACE FUNCTION loractl_is_new(job jobs) RETURNS boolean LANGUAGE sql
SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT job.status = 'queued' AND job.attempt = 0 AND
    NOT job.held AND coalesce(job.awaits, 0) < job.job_id AND
    job.retries_used = 0 AND job.lab_failures = 0 AND job.stops = 0 AND
    concat(job.token, job.adapter_uri, job.report_uri, job.result_host, job.manifest_sha256, job.reason, job.message,
      job.stage, job.preempted_by, job.node, job.gpu, job.method, job.vram_reserved, job.step, job.total_steps,
      job.loss, job.ancestor, job.tokens_per_second, job.eta_seconds, job.eta_spread_seconds, job.evaluated,
      job.to_evaluate, job.lab_step, job.checkpoint_s, job.avoids, job.not_before, job.started_at, job.ended_at,
      job.lease_expires_at, job.result_until) = '' AND
    coalesce(job.checkpoint::text, 'null') = 'null' AND loractl_readable(job) AND loractl_same_batch(job) AND
    job.submitted_at BETWEEN now() - interval '1 day' AND now() + interval '1 day' AND
    (job.sweep_id IS NULL OR EXISTS (SELECT FROM sweeps WHERE sweep_id = job.sweep_id AND "user" = session_user));
$$;
-- Triggers and functions of earlier versions, whose logins inserted rows themselves
DROP TRIGGER IF EXISTS loractl_no_claim ON jobs;
DROP TRIGGER IF EXISTS loractl_by_login ON events;
DROP TRIGGER IF EXISTS loractl_by_login ON sweeps;
DROP TRIGGER IF EXISTS loractl_by_login ON job_labels;
DROP TRIGGER IF EXISTS loractl_by_login ON looks;
DROP TRIGGER IF EXISTS loractl_by_login ON tags;
DROP TRIGGER IF EXISTS loractl_own_label ON job_labels;
DROP FUNCTION IF EXISTS loractl_own_label(), loractl_says_login(text), loractl_no_claim(), loractl_by_login(),
  loractl_stays_held(jobs, jobs);

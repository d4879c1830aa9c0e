-- The roles of a lab, what each may do, and the triggers that hold who submits to it. loractl db roles says all of
-- this in one transaction, and again after each upgrade: a line that was said before changes nothing.

DO $$ BEGIN
  IF to_regrole('loractl_submit') IS NULL THEN CREATE ROLE loractl_submit NOLOGIN; END IF;
  IF to_regrole('loractl_worker') IS NULL THEN CREATE ROLE loractl_worker NOLOGIN; END IF;
  IF to_regrole('loractl_web') IS NULL THEN CREATE ROLE loractl_web NOLOGIN; END IF; -- loractl web: it only reads
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
-- What an earlier version, or somebody by hand, has given them goes; nobody sees the moment between.
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM loractl_submit, loractl_worker, loractl_web;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM loractl_submit, loractl_worker, loractl_web;
GRANT USAGE ON SCHEMA public TO loractl_submit, loractl_worker, loractl_web;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO loractl_submit, loractl_worker, loractl_web;

-- submit, sweep, edit, cancel, hold, retry, and all that only reads
GRANT INSERT ON jobs, events, sweeps TO loractl_submit;
GRANT INSERT, UPDATE, DELETE ON tags TO loractl_submit;
GRANT INSERT, DELETE ON job_labels TO loractl_submit;
GRANT UPDATE (status, reason, message, stage, cancel_requested, preempted_by, held, not_before, retries_used, ended_at,
    token, lease_expires_at, step, total_steps, loss, tokens_per_second, eta_seconds, result_until, lab_failures,
    lab_step, avoids, name, labels, spec, spec_hash, priority, methods, preemptible, version, max_retries, vram_lora,
    vram_qlora, vram_needed, vram_class, planned, need_key, family, engine, queue_key, lora_until, adjustment,
    gangs) ON jobs TO loractl_submit;
GRANT USAGE ON SEQUENCE jobs_job_id_seq, events_event_id_seq, sweeps_sweep_id_seq TO loractl_submit;

-- worker, gc, adapters bind, drain and undrain: everything of a job's row but what was asked, and by whom
GRANT UPDATE (status, reason, message, stage, cancel_requested, preempted_by, held, not_before, retries_used, ended_at,
    token, lease_expires_at, step, total_steps, loss, tokens_per_second, eta_seconds, eta_spread_seconds, evaluated,
    to_evaluate, attempt,
    node, gpu, method, started_at, vram_reserved, vram_lora, vram_qlora, vram_needed, vram_class, planned, need_key,
    family, engine, queue_key, lora_until, checkpoint, adjustment, adapter_uri, report_uri, result_host, result_until,
    manifest_sha256, lab_failures, lab_step, avoids, gangs) ON jobs TO loractl_worker;
GRANT INSERT, UPDATE ON attempts, uses, fleet_rounds TO loractl_worker;
GRANT INSERT, UPDATE, DELETE ON nodes, hosts, drains, tags, outbox TO loractl_worker;
GRANT INSERT ON events, metrics, shares TO loractl_worker;
GRANT INSERT, DELETE ON log_chunks, adapters, lab_failures TO loractl_worker;
GRANT USAGE ON SEQUENCE events_event_id_seq, log_chunks_chunk_id_seq TO loractl_worker;

-- Who submits changes a status as cancel and retry do, and writes no row that has a history or that workers can't read.
-- What is asked of a job changes by its own login alone. Who did it is the login, whatever the client says. The search
-- path is fixed: a login's temporary table or sequence would else be taken for jobs or its numbers.
CREATE OR REPLACE FUNCTION loractl_readable(job jobs) RETURNS boolean LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  wanted text := substring(job.queue_key FROM '^[0-9]{5}[|][0-9]{3,}[|](.*)$');
BEGIN
  wanted := left(wanted, -1 - length(job."user")); -- the labels that it asks for
  RETURN json_typeof(job.methods) = 'array' AND job.methods::jsonb <@ '["lora", "qlora"]' AND
    job.priority BETWEEN -1000 AND 1000 AND
    left(job.queue_key, 5) = lpad((10000 - job.priority)::text, 5, '0') AND
    right(job.queue_key, length(job."user") + 1) = '|' || job."user" AND
    (CASE WHEN wanted = '' THEN true ELSE json_typeof(wanted::json) = 'object' END) AND
    coalesce(job.lora_until, now()) BETWEEN now() - interval '1 day' AND now() + interval '100 years';
END $$;
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
  SELECT (before.name, before.labels::text, before.spec::text, before.spec_hash, before.priority, before.methods::text,
      before.preemptible, before.version, before.max_retries, before.vram_lora, before.vram_qlora, before.vram_needed,
      before.vram_class, before.planned::text, before.need_key, before.family, before.engine, before.queue_key,
      before.lora_until, before.adjustment::text, before.gangs::text)
    IS NOT DISTINCT FROM (after.name, after.labels::text, after.spec::text, after.spec_hash, after.priority,
      after.methods::text, after.preemptible, after.version, after.max_retries, after.vram_lora, after.vram_qlora,
      after.vram_needed, after.vram_class, after.planned::text, after.need_key, after.family, after.engine,
      after.queue_key, after.lora_until, after.adjustment::text, after.gangs::text)
    OR before."user" = session_user AND before.status <> 'succeeded' AND loractl_readable(after) AND
      after.spec ->> 'name' = after.name AND after.spec ->> 'base_model' = after.base_model AND
      (after.adjustment::text IS NOT DISTINCT FROM before.adjustment::text OR
        coalesce(after.adjustment::text, 'null') = 'null') AND
      (after.spec::text = before.spec::text OR loractl_same_batch(after)) AND
      (before.status <> 'running' OR
        after.spec::jsonb - '{priority,labels,resources}'::text[] =
          before.spec::jsonb - '{priority,labels,resources}'::text[] AND
        (after.methods::text, after.vram_lora, after.vram_qlora, after.adjustment::text) IS NOT DISTINCT FROM
          (before.methods::text, before.vram_lora, before.vram_qlora, before.adjustment::text));
$$;
CREATE OR REPLACE FUNCTION loractl_says_login(told text) RETURNS boolean LANGUAGE sql -- the first "by" names who did it
SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT position(' by ' IN told) > 0 AND starts_with(who, session_user::text) AND
    substr(who, length(session_user::text) + 1, 1) !~ '[[:alnum:]_.-]'
  FROM (SELECT substring(told FROM position(' by ' IN told) + 4)) AS told_of(who);
$$;
CREATE OR REPLACE FUNCTION loractl_no_claim() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  drawn bigint;
BEGIN
  IF TG_OP = 'INSERT' THEN
    BEGIN
      drawn := currval('jobs_job_id_seq');
    EXCEPTION WHEN object_not_in_prerequisite_state THEN
      drawn := NULL; -- no number was drawn: it names one of its own
    END;
    IF NEW.job_id = drawn AND NEW.status = 'queued' AND NEW.attempt = 0 AND
        NEW.retries_used = 0 AND NEW.lab_failures = 0 AND
        concat(NEW.token, NEW.adapter_uri, NEW.report_uri, NEW.result_host, NEW.manifest_sha256, NEW.reason, NEW.stage,
          NEW.preempted_by, NEW.node, NEW.gpu, NEW.method, NEW.vram_reserved, NEW.step, NEW.total_steps, NEW.loss,
          NEW.lab_step, NEW.avoids) = '' AND
        coalesce(NEW.checkpoint::text, 'null') = 'null' AND loractl_readable(NEW) AND loractl_same_batch(NEW) AND
        NEW.submitted_at BETWEEN now() - interval '1 day' AND now() + interval '1 day' AND
        concat(NEW.not_before, NEW.started_at, NEW.ended_at, NEW.lease_expires_at, NEW.result_until) = '' THEN
      NEW.queue_key := left(NEW.queue_key, -length(NEW."user")) || session_user;
      NEW."user" := session_user;
      RETURN NEW;
    END IF;
  ELSIF loractl_may_edit(OLD, NEW) AND NEW.token IS NOT DISTINCT FROM OLD.token AND
      NEW.retries_used IN (0, OLD.retries_used) AND
      (NEW.reason IS NULL OR NEW.reason IN (OLD.reason, 'cancelled')) AND
      ((NEW.stage, NEW.preempted_by, NEW.step, NEW.total_steps, NEW.loss, NEW.tokens_per_second, NEW.eta_seconds,
          NEW.lab_failures, NEW.lab_step, NEW.avoids::text)
        IS NOT DISTINCT FROM (OLD.stage, OLD.preempted_by, OLD.step, OLD.total_steps, OLD.loss, OLD.tokens_per_second,
          OLD.eta_seconds, OLD.lab_failures, OLD.lab_step, OLD.avoids::text) OR
        OLD.status <> 'running' AND NEW.lab_failures = 0 AND -- a retry clears them
        concat(NEW.stage, NEW.preempted_by, NEW.step, NEW.total_steps, NEW.loss, NEW.tokens_per_second,
          NEW.eta_seconds, NEW.lab_step, NEW.avoids) = '') AND
      NEW.lease_expires_at IS NOT DISTINCT FROM OLD.lease_expires_at AND
      (NEW.not_before IS NULL OR NEW.not_before IS NOT DISTINCT FROM OLD.not_before) AND
      (NEW.ended_at IS NOT DISTINCT FROM OLD.ended_at OR
        coalesce(NEW.ended_at, now()) BETWEEN now() - interval '1 day' AND now() + interval '1 day') AND
      (NEW.result_until IS NOT DISTINCT FROM OLD.result_until OR
        coalesce(NEW.result_until, now()) BETWEEN now() - interval '1 day' AND now() + interval '1 day') AND
      (NEW.status = OLD.status OR
        OLD.status IN ('queued', 'failed', 'cancelled') AND NEW.status IN ('queued', 'cancelled')) THEN
    IF NEW.message IS DISTINCT FROM OLD.message AND NOT loractl_says_login(NEW.message) THEN
      NEW.message := NEW.message || ' (login ' || session_user || ')';
    END IF;
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'only a worker may claim and end jobs' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE OR REPLACE TRIGGER loractl_no_claim BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW
  WHEN (NOT pg_has_role('loractl_worker', 'MEMBER')) EXECUTE FUNCTION loractl_no_claim();

CREATE OR REPLACE FUNCTION loractl_by_login() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF TG_TABLE_NAME = 'events' THEN
    IF NEW.attempt IS NOT NULL THEN
      RAISE EXCEPTION 'only a worker tells of attempts' USING ERRCODE = 'insufficient_privilege';
    END IF;
    NEW.at := clock_timestamp();
    IF NOT loractl_says_login(NEW.text) THEN
      NEW.text := NEW.text || ' (login ' || session_user || ')';
    END IF;
  ELSIF TG_TABLE_NAME = 'tags' THEN
    NEW.at := clock_timestamp();
    NEW."user" := session_user;
  ELSE
    NEW.created_at := clock_timestamp();
    NEW."user" := session_user;
  END IF;
  RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER loractl_by_login BEFORE INSERT ON events FOR EACH ROW
  WHEN (NOT pg_has_role('loractl_worker', 'MEMBER')) EXECUTE FUNCTION loractl_by_login();
CREATE OR REPLACE TRIGGER loractl_by_login BEFORE INSERT OR UPDATE ON tags FOR EACH ROW
  WHEN (NOT pg_has_role('loractl_worker', 'MEMBER')) EXECUTE FUNCTION loractl_by_login();
CREATE OR REPLACE TRIGGER loractl_by_login BEFORE INSERT ON sweeps FOR EACH ROW
  WHEN (NOT pg_has_role('loractl_worker', 'MEMBER')) EXECUTE FUNCTION loractl_by_login();

CREATE OR REPLACE FUNCTION loractl_own_label() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  label job_labels := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
  IF EXISTS (SELECT FROM jobs WHERE job_id = label.job_id AND "user" <> session_user) THEN
    RAISE EXCEPTION 'a job is listed by its own labels' USING ERRCODE = 'insufficient_privilege';
  END IF;
  RETURN label;
END $$;
CREATE OR REPLACE TRIGGER loractl_own_label BEFORE INSERT OR DELETE ON job_labels FOR EACH ROW
  WHEN (NOT pg_has_role('loractl_worker', 'MEMBER')) EXECUTE FUNCTION loractl_own_label();

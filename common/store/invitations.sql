-- The invitations, and the one function that a join line's login may call. The tables' owner runs this, any number of
-- times. loractl_registrar owns the function: it makes logins, gives them a role of a lab, and can't log in itself.

DO $$ BEGIN
  IF to_regrole('loractl_join') IS NULL THEN CREATE ROLE loractl_join NOLOGIN; END IF;
  IF to_regrole('loractl_registrar') IS NULL THEN CREATE ROLE loractl_registrar NOLOGIN CREATEROLE; END IF;
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    EXECUTE format('GRANT loractl_registrar TO %I', current_user);
  END IF;
  EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO loractl_join', current_database());
END $$;
DO $$ DECLARE its text; BEGIN -- not again: a GRANT waits for a join line's open transaction
  FOREACH its IN ARRAY '{loractl_submit,loractl_worker}'::text[] LOOP
    IF NOT pg_has_role('loractl_registrar', its, 'MEMBER WITH ADMIN OPTION') THEN
      EXECUTE format('GRANT %I TO loractl_registrar WITH ADMIN OPTION', its);
    END IF;
  END LOOP;
END $$;

CREATE SCHEMA IF NOT EXISTS loractl_lab;
REVOKE ALL ON SCHEMA loractl_lab FROM PUBLIC;
GRANT USAGE ON SCHEMA loractl_lab TO loractl_join;
CREATE TABLE IF NOT EXISTS loractl_lab.invitations (
  login name PRIMARY KEY, -- of the join line
  role name NOT NULL CHECK (role IN ('loractl_submit', 'loractl_worker')),
  name name, -- of the login that it makes; null: the person who joins chooses a new one
  sealed text NOT NULL, -- addresses and keys, which the join line alone opens
  expires_at timestamptz NOT NULL
);
REVOKE ALL ON loractl_lab.invitations FROM PUBLIC;
GRANT SELECT, UPDATE, DELETE ON loractl_lab.invitations TO loractl_registrar; -- UPDATE: to lock a row

-- With a verifier it makes the login, or gives the one that the owner has named another password, and ends the
-- invitation. Without one it only says what the invitation is. A refusal is an answer, and changes nothing.
CREATE OR REPLACE FUNCTION loractl_lab.enter(wanted text, verifier text) RETURNS json
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
  invited loractl_lab.invitations;
  its_name text;
BEGIN
  SELECT * INTO invited FROM loractl_lab.invitations WHERE login = session_user AND expires_at > clock_timestamp();
  IF FOUND AND verifier IS NULL THEN -- a look locks nothing
    RETURN json_build_object('role', invited.role, 'name', invited.name, 'sealed', invited.sealed);
  END IF;
  PERFORM FROM loractl_lab.invitations WHERE login = session_user AND expires_at > clock_timestamp() FOR UPDATE;
  IF NOT FOUND THEN
    RETURN json_build_object('refused', 'spent');
  END IF;
  IF verifier !~ '^SCRAM-SHA-256\$[0-9]{4,6}:[A-Za-z0-9+/=]{16,64}\$[A-Za-z0-9+/=]{44}:[A-Za-z0-9+/=]{44}$' THEN
    RETURN json_build_object('refused', 'verifier');
  END IF;
  its_name := coalesce(invited.name, wanted);
  IF its_name IS NULL OR its_name !~ '^[a-z_][a-z0-9_.-]{0,62}$' OR its_name ~ '^(pg_|loractl|public$)' THEN
    RETURN json_build_object('refused', 'name');
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = its_name) THEN
    EXECUTE format('CREATE ROLE %I LOGIN CONNECTION LIMIT %s PASSWORD %L', its_name,
      CASE invited.role WHEN 'loractl_submit' THEN 20 ELSE -1 END, verifier);
  ELSIF invited.name IS NULL OR EXISTS (SELECT FROM pg_roles WHERE rolname = its_name AND
      (rolsuper OR rolcreaterole OR rolreplication OR rolbypassrls OR NOT rolcanlogin)) THEN
    RETURN json_build_object('refused', 'taken');
  ELSE
    EXECUTE format('ALTER ROLE %I PASSWORD %L', its_name, verifier);
  END IF;
  EXECUTE format('GRANT %I TO %I', invited.role, its_name);
  EXECUTE format('ALTER ROLE %I NOLOGIN', session_user);
  DELETE FROM loractl_lab.invitations WHERE login = session_user;
  RETURN json_build_object('name', its_name);
END $$;
REVOKE ALL ON FUNCTION loractl_lab.enter(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION loractl_lab.enter(text, text) TO loractl_join;
GRANT USAGE, CREATE ON SCHEMA loractl_lab TO loractl_registrar;
ALTER FUNCTION loractl_lab.enter(text, text) OWNER TO loractl_registrar;
REVOKE CREATE ON SCHEMA loractl_lab FROM loractl_registrar;

-- Logins of used lines, and of lines that nobody used in their hour.
DELETE FROM loractl_lab.invitations WHERE login IN -- but those that a line's open transaction keeps locked
  (SELECT login FROM loractl_lab.invitations WHERE expires_at < clock_timestamp() FOR UPDATE SKIP LOCKED);
DO $$ DECLARE
  spent name;
  patience text := current_setting('lock_timeout');
BEGIN
  PERFORM set_config('lock_timeout', '1s', true);
  FOR spent IN SELECT rolname FROM pg_roles WHERE rolname ~ '^loractl_join_[0-9a-f]{12}$' AND rolvaliduntil < now() LOOP
    BEGIN
      EXECUTE format('DROP ROLE %I', spent);
    EXCEPTION WHEN insufficient_privilege OR lock_not_available THEN
      NULL; -- another owner's, of another database of this server, or its transaction is open
    END;
  END LOOP;
  PERFORM set_config('lock_timeout', patience, true);
END $$;

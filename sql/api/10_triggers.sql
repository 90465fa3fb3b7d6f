-- What an INSERT, UPDATE or DELETE by a person means. Re-created at each migrate that changes it.
--
-- SECURITY DEFINER: a role that may only INSERT INTO build_queue needs no rights on builds.
-- SET search_path = pg_catalog, pg_temp: migrate sets it to the schema of these tables, then pg_temp.
-- #variable_conflict use_variable, and columns with their table: people may add columns of any name to builds.
-- The daemon's sessions set buildreactor.session = 'daemon': what it writes is not a wake, because a notifying
-- COMMIT takes a lock on the whole cluster until it is flushed, and results must not queue up behind each other.

CREATE OR REPLACE FUNCTION farm.build_queue_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    known text;
    wanted bigint[];
    fresh boolean := true;
BEGIN
    NEW.queued_xid := pg_current_xact_id();
    wanted := farm.build_needs_known(NEW.needs);

    IF NEW.build_id IS NULL THEN
        IF NEW.builder IS NULL THEN
            RAISE EXCEPTION 'a row in build_queue needs a builder or a build_id' USING
                ERRCODE = 'not_null_violation',
                HINT = 'INSERT INTO build_queue (builder) VALUES (''NAME'');  or, for a row of builds:  INSERT INTO build_queue (build_id) VALUES (ID);';
        END IF;
        IF NOT EXISTS (SELECT FROM farm.builders WHERE name = NEW.builder) THEN
            SELECT string_agg(name, ', ' ORDER BY name) || CASE WHEN (SELECT count(*) FROM farm.builders) > 20 THEN ', ...' ELSE '' END
            INTO known FROM (SELECT name FROM farm.builders ORDER BY name LIMIT 20) b;
            RAISE EXCEPTION 'there is no builder "%"', NEW.builder USING
                ERRCODE = 'foreign_key_violation',
                HINT = coalesce('There is: ' || known || '. ', '') || 'A new one: INSERT INTO builders (name, script) VALUES (''NAME'', ''SCRIPT'');';
        END IF;
        IF jsonb_typeof(NEW.properties) <> 'object' THEN
            RAISE EXCEPTION 'properties must be a JSON object, not %', jsonb_typeof(NEW.properties) USING
                ERRCODE = 'check_violation', HINT = 'For example ''{"revision": "1a2b3c"}''.';
        END IF;
        INSERT INTO farm.builds (builder, properties, reason, notify, needs, state, queued_at)
        VALUES (NEW.builder, coalesce(NEW.properties, '{}'), NEW.reason, coalesce(NEW.notify, '{}'), wanted, 'queued', clock_timestamp())
        RETURNING id INTO NEW.build_id;
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
    ELSE
        fresh := farm.build_queue_again(NEW.build_id, NEW.builder, NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL, wanted);
        SELECT b.builder, b.needs INTO NEW.builder, wanted FROM farm.builds b WHERE b.id = NEW.build_id;
    END IF;

    NEW.needs := farm.build_needs_open(wanted);
    NEW.ready := NEW.needs = '{}' AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
    -- Not for a row that the primary key will refuse.
    IF fresh AND NEW.coalesce_key IS NOT NULL THEN
        -- One INSERT of a key at a time, or two would not see each other's row. Class -3, until the end of the transaction.
        PERFORM pg_advisory_xact_lock(-3, hashtext(NEW.builder || ' ' || NEW.coalesce_key));
        PERFORM farm.build_queue_supersede(NEW.builder, NEW.coalesce_key, NEW.build_id);
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_queue_insert() IS 'Trigger: a row without build_id gets its row in builds; one with build_id queues that build (again).';

CREATE OR REPLACE FUNCTION farm.build_queue_again(id bigint, builder text, has_more boolean, wanted bigint[]) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds;
BEGIN
    SELECT * INTO build FROM farm.builds b WHERE b.id = $1 FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no build %', $1 USING
            ERRCODE = 'foreign_key_violation',
            HINT = 'Leave build_id out to describe a new build here, or INSERT INTO builds (builder) VALUES (''NAME'') RETURNING id first.';
    END IF;
    IF $2 IS DISTINCT FROM build.builder AND $2 IS NOT NULL THEN
        RAISE EXCEPTION 'build % is of builder "%", not "%"', build.id, build.builder, $2 USING
            ERRCODE = 'check_violation', HINT = 'Leave builder out when build_id is given.';
    END IF;
    IF has_more THEN
        RAISE EXCEPTION 'build % has its properties, reason and notify in builds already', build.id USING
            ERRCODE = 'check_violation', HINT = 'UPDATE builds SET ... WHERE id = ' || build.id || '; then queue it without them.';
    END IF;
    -- Queued or running already: the primary key refuses the row, so that ON CONFLICT DO NOTHING works too.
    IF build.state NOT IN ('queued', 'running') THEN
        IF wanted = '{}' THEN
            -- Nobody has looked at those that it was described with. Of one that ran before some may have been pruned.
            wanted := CASE WHEN build.state = 'described' THEN farm.build_needs_known(build.needs) ELSE build.needs END;
        END IF;
        IF wanted <> '{}' THEN
            PERFORM farm.build_needs_acyclic(build.id, wanted);
        END IF;
        UPDATE farm.builds b
        SET state = 'queued', queued_at = clock_timestamp(), finished_at = NULL, exit_code = NULL, term_signal = NULL, detail = NULL,
            cancel_requested_at = NULL, cancel_reason = NULL, superseded_by = NULL,
            needs = wanted
        WHERE b.id = build.id;
        RETURN true;
    END IF;
    RETURN false;
END $$;
COMMENT ON FUNCTION farm.build_queue_again(bigint, text, boolean, bigint[]) IS 'Checks that an existing build can be queued, and marks it so; false when it is queued or running already.';

CREATE OR REPLACE FUNCTION farm.build_needs_known(needs bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    missing bigint;
BEGIN
    IF needs IS NULL OR needs = '{}' THEN
        RETURN '{}';
    END IF;
    SELECT n INTO missing FROM unnest(needs) AS n WHERE NOT EXISTS (SELECT FROM farm.builds b WHERE b.id = n) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'needs: there is no build %', coalesce(missing::text, 'null') USING
            ERRCODE = 'foreign_key_violation', HINT = 'needs lists ids of builds that exist, for example ARRAY[41, 42].';
    END IF;
    RETURN ARRAY(SELECT DISTINCT n FROM unnest(needs) AS n ORDER BY n);
END $$;
COMMENT ON FUNCTION farm.build_needs_known(bigint[]) IS 'The needs, each once, in order; refuses builds that do not exist.';

CREATE OR REPLACE FUNCTION farm.build_needs_acyclic(id bigint, wanted bigint[]) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    around text;
BEGIN
    WITH RECURSIVE path AS (
        SELECT n AS at, ARRAY[id, n] AS way FROM unnest(wanted) AS n
        UNION ALL
        SELECT m, p.way || m FROM path p JOIN farm.builds b ON b.id = p.at CROSS JOIN unnest(b.needs) AS m
        WHERE p.at <> id AND NOT m = ANY (p.way[2:])
    )
    SELECT array_to_string(p.way, ' needs ') INTO around FROM path p WHERE p.at = id LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'needs go round in a circle: %', around USING ERRCODE = 'check_violation';
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_needs_acyclic(bigint, bigint[]) IS 'Refuses needs that lead back to the build itself.';

CREATE OR REPLACE FUNCTION farm.build_needs_open(needs bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF needs = '{}' THEN
        RETURN '{}';
    END IF;
    -- A superseded build is stood for by the one that took its place.
    RETURN ARRAY(
        WITH RECURSIVE stands AS (
            SELECT b.id, b.state, b.superseded_by FROM farm.builds b WHERE b.id = ANY ($1)
            UNION
            SELECT b.id, b.state, b.superseded_by FROM stands s JOIN farm.builds b ON b.id = s.superseded_by
        )
        SELECT s.id FROM stands s WHERE s.state NOT IN ('passed', 'superseded') ORDER BY s.id);
END $$;
COMMENT ON FUNCTION farm.build_needs_open(bigint[]) IS 'Those of the needs that have not passed.';

CREATE OR REPLACE FUNCTION farm.build_needs_settle(waiting bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    row farm.build_queue;
    open_needs bigint[];
    broken farm.builds;
BEGIN
    -- Two needs that end at the same instant: the second waits here for the first, and then sees its result.
    SELECT * INTO row FROM farm.build_queue q WHERE q.build_id = waiting AND q.needs <> '{}' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    open_needs := farm.build_needs_open(row.needs);
    SELECT b.* INTO broken FROM farm.builds b WHERE b.id = ANY (open_needs) AND farm.build_state_is_final(b.state) ORDER BY b.id LIMIT 1;
    IF FOUND THEN
        UPDATE farm.builds b
        SET state = 'skipped', finished_at = clock_timestamp(), exit_code = NULL, term_signal = NULL,
            detail = format('needs build %s, which ended %s', broken.id, broken.state)
        WHERE b.id = waiting AND b.state IN ('described', 'queued');
        -- Not one that has begun, against all expectation: its result finds its row by it.
        IF FOUND THEN
            DELETE FROM farm.build_queue q WHERE q.build_id = waiting;
        END IF;
    ELSIF open_needs <> row.needs THEN
        UPDATE farm.build_queue q SET needs = open_needs WHERE q.build_id = waiting;
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_needs_settle(bigint) IS 'Looks at the needs of a waiting build: releases it when all have passed, skips it when one has ended otherwise.';

CREATE OR REPLACE FUNCTION farm.build_ended() RETURNS trigger
    -- The planner expects many from a recursive query, and would have it compiled for each build that ends.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_variable
BEGIN
    -- As a rule nothing hangs on it, and what follows is costly to prepare.
    IF NOT EXISTS (SELECT FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[NEW.id]) THEN
        RETURN NULL;
    END IF;
    IF NEW.state <> 'skipped' THEN
        -- All that may be released or skipped, through any depth, in the order of ids: transactions that end needs of the same
        -- builds lock them in the same order. What is skipped comes here again, with its rows locked already.
        -- An array, not IN: the planner expects many from a recursive query, and would merge with all that waits.
        PERFORM FROM farm.build_queue q
        WHERE q.build_id = ANY (ARRAY(
            WITH RECURSIVE below AS (
                SELECT w.build_id FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[NEW.id]
                UNION
                SELECT w.build_id FROM below d JOIN farm.build_queue w ON w.needs <> '{}' AND w.needs @> ARRAY[d.build_id]
            )
            SELECT build_id FROM below))
        ORDER BY q.build_id FOR UPDATE;
    END IF;
    PERFORM farm.build_needs_settle(q.build_id)
    FROM (SELECT w.build_id FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[NEW.id] ORDER BY w.build_id) q;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_ended() IS 'Trigger: a build that reaches a final state releases or skips those that need it, in the same transaction.';

CREATE OR REPLACE FUNCTION farm.build_queue_supersede(builder text, coalesce_key text, newest bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    older bigint;
BEGIN
    -- SKIP LOCKED: a row that is claimed runs, and is never touched.
    FOR older IN
        SELECT q.build_id FROM farm.build_queue q
        WHERE q.builder = $1 AND q.coalesce_key = $2 AND q.build_id <> $3
          -- What the newest needs is not done by the newest.
          AND q.build_id NOT IN (
              WITH RECURSIVE up AS (
                  SELECT n FROM farm.builds b CROSS JOIN unnest(b.needs) AS n WHERE b.id = $3
                  UNION
                  SELECT m FROM up u JOIN farm.builds b ON b.id = u.n CROSS JOIN unnest(b.needs || b.superseded_by) AS m WHERE m IS NOT NULL
              )
              SELECT n FROM up)
        ORDER BY q.build_id FOR UPDATE SKIP LOCKED
    LOOP
        UPDATE farm.builds b
        SET state = 'superseded', superseded_by = newest, finished_at = clock_timestamp(), exit_code = NULL, term_signal = NULL,
            detail = format('superseded by build %s', newest)
        WHERE b.id = older AND b.state = 'queued';
        IF FOUND THEN
            DELETE FROM farm.build_queue q WHERE q.build_id = older;
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION farm.build_queue_supersede(text, text, bigint) IS 'Ends the other waiting builds of the builder and key.';

CREATE OR REPLACE FUNCTION farm.build_queue_update() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF NEW.build_id <> OLD.build_id OR NEW.builder <> OLD.builder THEN
        RAISE EXCEPTION 'the % of queued build % cannot be changed', CASE WHEN NEW.build_id <> OLD.build_id THEN 'build_id' ELSE 'builder' END, OLD.build_id USING
            ERRCODE = 'check_violation',
            HINT = 'DELETE FROM build_queue WHERE build_id = ' || OLD.build_id || '; then INSERT it anew.';
    END IF;
    IF NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL THEN
        UPDATE farm.builds
        SET properties = coalesce(NEW.properties, properties), reason = coalesce(NEW.reason, reason), notify = coalesce(NEW.notify, notify)
        WHERE id = NEW.build_id;
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
    END IF;
    -- Not when build_needs_settle puts a stand-in there.
    IF pg_trigger_depth() = 1 AND current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon'
       AND NEW.needs <> OLD.needs AND NOT NEW.needs <@ OLD.needs THEN
        NEW.needs := farm.build_needs_known(NEW.needs);
        PERFORM farm.build_needs_acyclic(NEW.build_id, NEW.needs);
        UPDATE farm.builds SET needs = NEW.needs WHERE id = NEW.build_id;
        NEW.needs := farm.build_needs_open(NEW.needs);
    END IF;
    NEW.queued_xid := pg_current_xact_id();
    NEW.ready := NEW.needs = '{}' AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_queue_update() IS 'Trigger: keeps ready and queued_xid; passes properties, reason and notify on to builds.';

CREATE OR REPLACE FUNCTION farm.build_queue_ask() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- A running build's row is locked for hours, and no trigger of the row's comes before that wait. So whoever may be going to
    -- wait says so with a lock (class -4); the worker that holds the row sees it waiting, steps aside for a moment, and
    -- build_queue_refuse gives it an answer. Should no worker do so, the wait ends all the same.
    PERFORM pg_advisory_xact_lock_shared(-4, 0);
    IF current_setting('buildreactor.lock_timeout', true) IS NULL OR current_setting('buildreactor.lock_timeout', true) = '' THEN
        PERFORM set_config('buildreactor.lock_timeout', current_setting('lock_timeout'), true);
    END IF;
    PERFORM set_config('lock_timeout', '2500ms', true);
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_ask() IS 'Trigger: before an UPDATE or DELETE by a person; limits its wait for a running build''s row.';

CREATE OR REPLACE FUNCTION farm.build_queue_asked() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM set_config('lock_timeout', current_setting('buildreactor.lock_timeout'), true);
    PERFORM set_config('buildreactor.lock_timeout', '', true);
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_asked() IS 'Trigger: after an UPDATE or DELETE by a person; puts lock_timeout back.';

CREATE OR REPLACE FUNCTION farm.build_queue_refuse() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF EXISTS (SELECT FROM farm.builds b WHERE b.id = OLD.build_id AND b.state = 'running') THEN
        RAISE EXCEPTION 'build % is running', OLD.build_id USING
            ERRCODE = 'object_in_use',
            HINT = format('SELECT cancel_build(%s, ''reason''); stops it. Priority, time and needs have no meaning for a build that runs. Those that wait alone: ... WHERE build_id IN (SELECT build_id FROM queue_status).', OLD.build_id);
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_queue_refuse() IS 'Trigger: a running build''s row is its worker''s; names the function to use instead.';

CREATE OR REPLACE FUNCTION farm.build_queue_delete() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    UPDATE farm.builds
    SET state = 'cancelled', finished_at = clock_timestamp(), detail = format('deleted from build_queue by %s', session_user)
    WHERE id = OLD.build_id AND state IN ('queued', 'running');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_delete() IS 'Trigger: deleting a waiting row cancels its build.';

CREATE OR REPLACE FUNCTION farm.build_queue_truncate() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    RAISE EXCEPTION 'TRUNCATE would leave builds queued without a row' USING
        ERRCODE = 'object_not_in_prerequisite_state', HINT = 'DELETE FROM build_queue WHERE build_id IN (SELECT build_id FROM queue_status); cancels what waits.';
END $$;
COMMENT ON FUNCTION farm.build_queue_truncate() IS 'Trigger: refuses TRUNCATE of build_queue.';

CREATE OR REPLACE FUNCTION farm.build_queue_wake() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM pg_notify('build_queue', '');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_wake() IS 'Trigger: NOTIFY build_queue, once a statement.';

CREATE OR REPLACE FUNCTION farm.builders_changed() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM pg_notify('build_control', 'builders');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.builders_changed() IS 'Trigger: NOTIFY build_control, so that a change of a builder takes effect at once.';

CREATE OR REPLACE FUNCTION farm.builder_locks_known() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    missing text;
BEGIN
    SELECT n INTO missing FROM unnest(NEW.locks) AS n WHERE NOT EXISTS (SELECT FROM farm.build_locks l WHERE l.name = n) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'builder "%" names the lock "%", which does not exist', NEW.name, missing USING
            ERRCODE = 'foreign_key_violation', HINT = format('INSERT INTO build_locks (name, capacity) VALUES (%L, 1);', missing);
    END IF;
    NEW.locks := ARRAY(SELECT DISTINCT n FROM unnest(NEW.locks) AS n ORDER BY n);
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.builder_locks_known() IS 'Trigger: builders.locks names build_locks, each once.';

CREATE OR REPLACE FUNCTION farm.build_locks_unused() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    builder text;
BEGIN
    SELECT r.name INTO builder FROM farm.builders r WHERE OLD.name = ANY (r.locks) LIMIT 1;
    IF FOUND AND (TG_OP = 'DELETE' OR NEW.name <> OLD.name) THEN
        RAISE EXCEPTION 'lock "%" is named by builder "%"', OLD.name, builder USING
            ERRCODE = 'foreign_key_violation', HINT = 'Take it out of builders.locks first.';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_locks_unused() IS 'Trigger: a lock that a builder names is neither deleted nor renamed.';

CREATE OR REPLACE FUNCTION farm.builds_insert() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- The queue's own trigger inserts queued builds; it stands one level above this one.
    IF NEW.state IN ('queued', 'running') AND pg_trigger_depth() < 2 THEN
        RAISE EXCEPTION 'a new row of builds cannot be %', NEW.state USING
            ERRCODE = 'check_violation',
            HINT = 'INSERT INTO builds (builder) VALUES (''NAME'') RETURNING id; describes a build, INSERT INTO build_queue (build_id) VALUES (ID); queues it.';
    END IF;
    IF NOT EXISTS (SELECT FROM farm.builders WHERE name = NEW.builder) THEN
        RAISE EXCEPTION 'there is no builder "%"', NEW.builder USING
            ERRCODE = 'foreign_key_violation',
            HINT = 'SELECT name FROM builders; shows what there is. A new one: INSERT INTO builders (name, script) VALUES (''NAME'', ''SCRIPT'');';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.builds_insert() IS 'Trigger: a build is inserted as described, or, for history from elsewhere, in a final state.';

CREATE OR REPLACE FUNCTION farm.builds_delete() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- Checked here, before the foreign key would wait for the running build's claim.
    IF OLD.state IN ('queued', 'running') THEN
        RAISE EXCEPTION 'build % is %', OLD.id, OLD.state USING
            ERRCODE = 'object_in_use', HINT = 'Only a build that is not in build_queue can be deleted.';
    END IF;
    RETURN OLD;
END $$;
COMMENT ON FUNCTION farm.builds_delete() IS 'Trigger: refuses to delete a build that waits or runs.';

CREATE OR REPLACE FUNCTION farm.build_schedules_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    zone text;
    moved boolean := true;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        moved := NEW.cron <> OLD.cron OR NEW.time_zone <> OLD.time_zone OR NEW.enabled <> OLD.enabled;
    END IF;
    IF NOT EXISTS (SELECT FROM farm.builders b WHERE b.name = NEW.builder) THEN
        RAISE EXCEPTION 'there is no builder "%"', NEW.builder USING
            ERRCODE = 'foreign_key_violation',
            HINT = 'SELECT name FROM builders; shows what there is. A new one: INSERT INTO builders (name, script) VALUES (''NAME'', ''SCRIPT'');';
    END IF;
    IF moved THEN
        -- Letters and signs only: what they mean is for the daemons, which disable a schedule that they do not understand.
        IF NEW.cron !~ '^[[:space:]]*([0-9A-Za-z*?,/#-]+[[:space:]]+){4}[0-9A-Za-z*?,/#-]+[[:space:]]*$' THEN
            RAISE EXCEPTION 'cron must have 5 fields, not "%"', NEW.cron USING
                ERRCODE = 'check_violation',
                HINT = 'Minute, hour, day of month, month, day of week: ''30 2 * * *'' is 02:30 each night, ''0 * * * *'' each hour, ''0 6 * * MON-FRI'' 06:00 on working days.';
        END IF;
        SELECT z.name INTO zone FROM pg_timezone_names z WHERE lower(z.name) = lower(NEW.time_zone) LIMIT 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no time zone "%"', NEW.time_zone USING
                ERRCODE = 'check_violation',
                HINT = 'SELECT name FROM pg_timezone_names; shows what there is, for example UTC, Europe/Berlin, America/New_York.';
        END IF;
        NEW.time_zone := zone;
    END IF;
    IF NOT NEW.enabled OR (TG_OP = 'UPDATE' AND moved) THEN
        NEW.next_at := NULL;
    END IF;
    IF NEW.enabled AND moved THEN
        NEW.detail := NULL;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_schedules_change() IS 'Trigger: checks a schedule that a person writes; a changed one is planned anew.';

CREATE OR REPLACE FUNCTION farm.build_schedules_changed() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM pg_notify('build_control', 'schedules');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_schedules_changed() IS 'Trigger: NOTIFY build_control, so that a change of a schedule takes effect at once.';

CREATE OR REPLACE TRIGGER a_insert BEFORE INSERT ON farm.build_queue FOR EACH ROW EXECUTE FUNCTION farm.build_queue_insert();
CREATE OR REPLACE TRIGGER a_update BEFORE UPDATE ON farm.build_queue FOR EACH ROW EXECUTE FUNCTION farm.build_queue_update();
CREATE OR REPLACE TRIGGER a_ask BEFORE UPDATE OR DELETE ON farm.build_queue FOR EACH STATEMENT
    WHEN (pg_trigger_depth() = 0 AND current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_ask();
CREATE OR REPLACE TRIGGER a_asked AFTER UPDATE OR DELETE ON farm.build_queue FOR EACH STATEMENT
    WHEN (pg_trigger_depth() = 0 AND current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_asked();
CREATE OR REPLACE TRIGGER a_refuse BEFORE UPDATE OR DELETE ON farm.build_queue FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_refuse();
CREATE OR REPLACE TRIGGER a_delete AFTER DELETE ON farm.build_queue FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_delete();
CREATE OR REPLACE TRIGGER a_truncate BEFORE TRUNCATE ON farm.build_queue FOR EACH STATEMENT EXECUTE FUNCTION farm.build_queue_truncate();
CREATE OR REPLACE TRIGGER build_queue_wake AFTER INSERT OR UPDATE ON farm.build_queue FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_wake();
CREATE OR REPLACE TRIGGER a_locks BEFORE INSERT OR UPDATE OF locks ON farm.builders FOR EACH ROW WHEN (NEW.locks <> '{}') EXECUTE FUNCTION farm.builder_locks_known();
CREATE OR REPLACE TRIGGER a_unused BEFORE UPDATE OR DELETE ON farm.build_locks FOR EACH ROW EXECUTE FUNCTION farm.build_locks_unused();
CREATE OR REPLACE TRIGGER locks_changed AFTER INSERT OR UPDATE OR DELETE ON farm.build_locks FOR EACH STATEMENT EXECUTE FUNCTION farm.builders_changed();
CREATE OR REPLACE TRIGGER builders_changed AFTER INSERT OR UPDATE OR DELETE ON farm.builders FOR EACH STATEMENT EXECUTE FUNCTION farm.builders_changed();
CREATE OR REPLACE TRIGGER ended AFTER UPDATE OF state ON farm.builds FOR EACH ROW
    WHEN (farm.build_state_is_final(NEW.state) AND NOT farm.build_state_is_final(OLD.state)) EXECUTE FUNCTION farm.build_ended();
CREATE OR REPLACE TRIGGER a_insert BEFORE INSERT ON farm.builds FOR EACH ROW EXECUTE FUNCTION farm.builds_insert();
CREATE OR REPLACE TRIGGER a_delete BEFORE DELETE ON farm.builds FOR EACH ROW EXECUTE FUNCTION farm.builds_delete();
CREATE OR REPLACE TRIGGER a_change BEFORE INSERT OR UPDATE ON farm.build_schedules FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_schedules_change();
CREATE OR REPLACE TRIGGER build_schedules_changed AFTER INSERT OR UPDATE OR DELETE ON farm.build_schedules FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_schedules_changed();

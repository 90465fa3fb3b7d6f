-- What an INSERT, UPDATE or DELETE by a person means. Re-created at each migrate that changes it.
--
-- `farm` stands for the schema of these objects; migrate writes its real name. search_path = pg_catalog, pg_temp: these functions find no
-- operator or function that somebody has put into a schema.
-- SECURITY DEFINER: a role that may only INSERT INTO build_queue needs no rights on builds.
-- #variable_conflict use_variable, and columns with their table: people may add columns of any name to builds.
-- The daemon's sessions set buildreactor.session = 'daemon': what the daemon writes is not a wake, because a notifying COMMIT takes a lock
-- on the whole cluster until it is flushed, and results must not queue up behind each other. What a person's own trigger does inside such
-- a session is a person's statement all the same: pg_trigger_depth() tells.
-- No statement of a submitter may keep a lock, until his transaction ends, that somebody else's build, result or cancel waits for.

CREATE OR REPLACE FUNCTION farm.build_queue_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    known text;
    wanted bigint[];
    fresh boolean := true;
BEGIN
    NEW.queued_xid := pg_current_xact_id();
    wanted := CASE WHEN NEW.needs IS NULL OR NEW.needs = '{}' THEN '{}' ELSE farm.build_needs_known(NEW.needs) END;
    PERFORM farm.build_coalesce_key_fits(NEW.coalesce_key);

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
        -- The mark that builds_insert asks for.
        PERFORM set_config('buildreactor.queueing', 'yes', true);
        INSERT INTO farm.builds (builder, properties, reason, notify, needs, state, queued_at, queued_by)
        VALUES (NEW.builder, coalesce(NEW.properties, '{}'), NEW.reason, coalesce(NEW.notify, '{}'), wanted, 'queued', clock_timestamp(), session_user)
        RETURNING id INTO NEW.build_id;
        PERFORM farm.build_all_written(CASE WHEN NEW.build_id IS NULL THEN 'builds' END);
        PERFORM set_config('buildreactor.queueing', '', true);
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
    ELSE
        fresh := farm.build_queue_again(NEW.build_id, NEW.builder, NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL, wanted);
        SELECT b.builder, b.needs INTO NEW.builder, wanted FROM farm.builds b WHERE b.id = NEW.build_id;
    END IF;

    NEW.needs := CASE WHEN wanted = '{}' THEN '{}' ELSE farm.build_needs_open(wanted) END;
    NEW.ready := NEW.needs = '{}' AND (NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp());
    -- Not for a row that the primary key will refuse. His own builds alone, which nobody else's statement waits for: those of others are
    -- superseded by the next worker that looks.
    IF fresh AND NEW.coalesce_key IS NOT NULL THEN
        PERFORM farm.build_coalesce_lock(NEW.builder, NEW.coalesce_key);
        NEW.priority := farm.build_queue_coalesce(NEW.builder, NEW.coalesce_key, NEW.build_id, NEW.priority, NEW.run_after, NEW.needs, session_user);
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION farm.build_queue_insert() IS 'Trigger: a row without build_id gets its row in builds; one with build_id queues that build (again).';

CREATE OR REPLACE FUNCTION farm.build_coalesce_key_fits(coalesce_key text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- No CHECK: ALTER TABLE build_queue would wait for all that runs. A longer one does not fit into an index.
    IF octet_length(coalesce_key) > 1000 THEN
        RAISE EXCEPTION 'coalesce_key has % bytes; at most 1000', octet_length(coalesce_key) USING
            ERRCODE = 'check_violation', HINT = 'For example the branch, or md5(...) of something longer.';
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_coalesce_key_fits(text) IS 'Refuses a coalesce_key of more than 1000 bytes.';

CREATE OR REPLACE FUNCTION farm.build_queue_again(id bigint, builder text, has_more boolean, wanted bigint[]) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds;
BEGIN
    -- Without a lock: the row of a build that waits or runs must stay free for its start, its result, a cancel.
    SELECT * INTO build FROM farm.builds b WHERE b.id = $1;
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
    -- From here on this statement can wait for nothing but somebody else's open transaction. build_queue_asked restores lock_timeout.
    PERFORM farm.build_wait_briefly('1s');
    -- Queued or running already: the primary key refuses the row, so that ON CONFLICT DO NOTHING works too.
    IF build.state IN ('queued', 'running') THEN
        RETURN false;
    END IF;
    IF NOT farm.build_is_for(build.submitted_by) THEN
        RAISE EXCEPTION 'build % was submitted by %: % may not queue it', build.id, build.submitted_by, session_user USING
            ERRCODE = 'insufficient_privilege',
            HINT = 'Leave build_id out for a build of your own, or ask somebody who may: who submitted it, or an operator.';
    END IF;
    BEGIN
        SELECT * INTO build FROM farm.builds b WHERE b.id = $1 FOR NO KEY UPDATE;
    EXCEPTION WHEN lock_not_available THEN
        RAISE EXCEPTION 'build % is held by %', $1, farm.build_holder($1) USING
            ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended; SELECT pg_terminate_backend(PID); ends it.';
    END;
    IF build.id IS NULL OR build.state IN ('queued', 'running') THEN
        RETURN false;
    END IF;
    IF wanted = '{}' THEN
        -- Nobody has looked at those that it was described with. Of one that ran before some may have been pruned.
        wanted := CASE WHEN build.state = 'described' THEN farm.build_needs_known(build.needs) ELSE build.needs END;
    END IF;
    IF wanted <> '{}' THEN
        PERFORM farm.build_needs_acyclic(build.id, wanted);
    END IF;
    UPDATE farm.builds b
    SET state = 'queued', queued_at = clock_timestamp(), queued_by = session_user, finished_at = NULL, exit_code = NULL, term_signal = NULL,
        detail = NULL, cancel_requested_at = NULL, cancel_reason = NULL, superseded_by = NULL,
        needs = wanted
    WHERE b.id = build.id
    RETURNING b.state INTO build.state;
    PERFORM farm.build_all_written(CASE WHEN build.state IS DISTINCT FROM 'queued' THEN 'builds' END);
    RETURN true;
END $$;
COMMENT ON FUNCTION farm.build_queue_again(bigint, text, boolean, bigint[]) IS 'Checks that an existing build can be queued, and by this person, and marks it so; false when it is queued or running already.';

CREATE OR REPLACE FUNCTION farm.build_is_for(submitted_by text) RETURNS boolean
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- SET ROLE takes rights away; session_user keeps his own builds.
    SELECT $1 = session_user OR EXISTS (
        SELECT FROM pg_proc p JOIN pg_type t ON t.typnamespace = p.pronamespace
        WHERE t.oid = pg_typeof(NULL::farm.builds) AND p.proname = 'pause_builder' AND oidvectortypes(p.proargtypes) = 'text, text'
          AND has_function_privilege(CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role') END, p.oid, 'EXECUTE'))
$$;
COMMENT ON FUNCTION farm.build_is_for(text) IS 'Whether the person of this session may steer a build that this role submitted: that role itself may, and whoever may call pause_builder, which makes an operator.';

CREATE OR REPLACE FUNCTION farm.build_holder(id bigint) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    RETURN coalesce(
        (SELECT 'an open transaction of ' || farm.build_session(l.pid) FROM farm.builds b JOIN pg_locks l ON l.transactionid = b.xmax
         WHERE b.id = $1 AND l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted LIMIT 1),
        -- Written behind a savepoint, or in a function with an EXCEPTION block: the lock table does not tell whose the row is.
        (SELECT 'an open transaction, perhaps of ' || string_agg(DISTINCT farm.build_session(l.pid), ' or ')
         FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid() AND l.mode IN ('RowShareLock', 'RowExclusiveLock')
           AND l.relation = (SELECT t.typrelid FROM pg_type t WHERE t.oid = pg_typeof(NULL::farm.builds)) AND a.application_name NOT LIKE 'buildreactor %'),
        'an open transaction');
END $$;
COMMENT ON FUNCTION farm.build_holder(bigint) IS 'Whose open transaction holds the row of a build in builds, in words.';

CREATE OR REPLACE FUNCTION farm.build_session(pid integer) RETURNS text
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce((SELECT format('%s (%s)', a.usename, concat_ws(', ', nullif(a.application_name, ''), 'process ' || $1)) FROM pg_stat_activity a WHERE a.pid = $1),
                    'process ' || $1)
$$;
COMMENT ON FUNCTION farm.build_session(integer) IS 'A session of the server in words: role, application and process.';

CREATE OR REPLACE FUNCTION farm.build_wait_briefly(longest text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    -- A list with an entry for each statement that waits briefly, the innermost first: its trigger depth, a colon, and the lock_timeout
    -- from before that statement. Commas separate the entries.
    kept text := coalesce(current_setting('buildreactor.lock_timeout', true), '');
BEGIN
    IF split_part(kept, ':', 1) <> pg_trigger_depth()::text THEN
        PERFORM set_config('buildreactor.lock_timeout', pg_trigger_depth() || ':' || current_setting('lock_timeout') || ',' || kept, true);
    END IF;
    PERFORM set_config('lock_timeout', longest, true);
END $$;
COMMENT ON FUNCTION farm.build_wait_briefly(text) IS 'Limits how long the statement of a trigger waits for a lock, until build_queue_asked puts lock_timeout back. Internal.';

CREATE OR REPLACE FUNCTION farm.build_queue_ask() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- A running build's row is locked for hours, and no trigger of the row's comes before that wait. So whoever may be going to
    -- wait says so with a lock (ask, in build_advisory_locks); the worker that holds the row sees it waiting, steps aside for a moment, and
    -- build_queue_refuse gives it an answer. Should no worker do so, the wait ends all the same.
    -- Nobody else has reason to have it: if somebody has, this wait ends as if there were no worker.
    PERFORM pg_try_advisory_xact_lock_shared(2041775265, pg_backend_pid());
    PERFORM farm.build_wait_briefly('2500ms');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_ask() IS 'Trigger: before an UPDATE or DELETE by a person; limits its wait for a running build''s row.';

CREATE OR REPLACE FUNCTION farm.build_queue_asked() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    kept text := current_setting('buildreactor.lock_timeout', true);
    own text := split_part(kept, ',', 1);
BEGIN
    IF split_part(own, ':', 1) = pg_trigger_depth()::text THEN
        PERFORM set_config('lock_timeout', split_part(own, ':', 2), true);
        PERFORM set_config('buildreactor.lock_timeout', substr(kept, length(own) + 2), true);
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_queue_asked() IS 'Trigger: after a statement that was to wait briefly; puts lock_timeout back.';

CREATE OR REPLACE FUNCTION farm.build_queue_update() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF NEW.build_id <> OLD.build_id OR NEW.builder <> OLD.builder THEN
        RAISE EXCEPTION 'the % of queued build % cannot be changed', CASE WHEN NEW.build_id <> OLD.build_id THEN 'build_id' ELSE 'builder' END, OLD.build_id USING
            ERRCODE = 'check_violation',
            HINT = 'DELETE FROM build_queue WHERE build_id = ' || OLD.build_id || '; then INSERT it anew.';
    END IF;
    PERFORM farm.build_coalesce_key_fits(NEW.coalesce_key);
    IF NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL THEN
        UPDATE farm.builds
        SET properties = coalesce(NEW.properties, properties), reason = coalesce(NEW.reason, reason), notify = coalesce(NEW.notify, notify)
        WHERE id = NEW.build_id;
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
    END IF;
    -- Not when a worker puts a stand-in there. A person's trigger inside the worker's session is no worker.
    IF (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon' OR pg_trigger_depth() > 1)
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
    -- The queue's own trigger inserts queued builds, and nobody else. It leaves a mark, and works as the owner of the tables: so the
    -- mark is of no use to another role.
    IF NEW.state IN ('queued', 'running')
       AND NOT (NEW.state = 'queued' AND coalesce(current_setting('buildreactor.queueing', true), '') = 'yes'
                AND current_user = (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = TG_RELID)) THEN
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

-- crontab(5), whatever the locale: a Turkish lower('FRI') is no name of a day. Loops: at most 200 bytes come here.
CREATE OR REPLACE FUNCTION farm.build_cron_refusal(cron text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    names    constant text[] := ARRAY['minute', 'hour', 'day of month', 'month', 'day of week'];
    lowest   constant integer[] := '{0,0,1,1,0}';
    highest  constant integer[] := '{59,23,31,12,7}';
    months   constant text[] := '{JAN,FEB,MAR,APR,MAY,JUN,JUL,AUG,SEP,OCT,NOV,DEC}';
    weekdays constant text[] := '{SUN,MON,TUE,WED,THU,FRI,SAT}';
    lengths  constant integer[] := '{31,29,31,30,31,30,31,31,30,31,30,31}';
    text_of  constant text := upper(btrim(cron, E' \t\r\n') COLLATE "C");
    fields   constant text[] := regexp_split_to_array(text_of, E'[ \t\r\n]+');
    about    constant text := format('cron "%s": ', cron);
    item     text;
    part     text;
    parts    text[];
    bounds   integer[];
    earliest integer := 31;
    longest  integer := 0;
BEGIN
    IF text_of IN ('@YEARLY', '@ANNUALLY', '@MONTHLY', '@WEEKLY', '@DAILY', '@MIDNIGHT', '@HOURLY') THEN
        RETURN NULL;
    ELSIF text_of = '@REBOOT' THEN
        RETURN about || '@reboot has no meaning here: schedules go by the clock, not by the start of a machine';
    ELSIF text_of LIKE '@%' THEN
        RETURN about || 'there are @hourly, @daily, @midnight, @weekly, @monthly, @yearly and @annually alone';
    ELSIF cardinality(fields) <> 5 THEN
        RETURN format('cron must have 5 fields, not "%s"', cron);
    END IF;
    FOR i IN 1..5 LOOP
        FOREACH item IN ARRAY string_to_array(fields[i], ',') LOOP
            -- *, a value, or a range; after * and ranges a step.
            parts := regexp_match(item, '^([*]|([0-9A-Z]+)(-([0-9A-Z]+))?)(/([0-9A-Z]+))?$');
            IF parts IS NULL THEN
                RETURN about || format('%s "%s" is not *, a value, a range a-b, or a step */n or a-b/n of crontab(5)', names[i], item);
            END IF;
            bounds := ARRAY[lowest[i], highest[i]];
            FOR n IN 1..2 LOOP
                part := CASE n WHEN 1 THEN parts[2] ELSE coalesce(parts[4], parts[2]) END;
                CONTINUE WHEN part IS NULL;
                bounds[n] := CASE
                    WHEN part ~ '^0*[0-9]{1,4}$' THEN right(part, 4)::integer
                    WHEN i = 4 THEN array_position(months, part)
                    WHEN i = 5 THEN array_position(weekdays, part) - 1
                END;
                IF bounds[n] IS NULL OR bounds[n] NOT BETWEEN lowest[i] AND highest[i] THEN
                    RETURN about || format('%s %s is not in %s-%s%s', names[i], part, lowest[i], highest[i],
                        CASE i WHEN 4 THEN ' or JAN-DEC' WHEN 5 THEN ' or SUN-SAT' ELSE '' END);
                END IF;
            END LOOP;
            IF bounds[1] > bounds[2] THEN
                RETURN about || format('%s %s ends before it begins', names[i], item);
            ELSIF parts[5] IS NOT NULL AND parts[6] !~ '^0*[0-9]{1,4}$' OR parts[6] ~ '^0*$' THEN
                RETURN about || format('the step of %s %s is not a number from 1 to 9999', names[i], item);
            ELSIF parts[5] IS NOT NULL AND parts[2] IS NOT NULL AND parts[3] IS NULL THEN
                RETURN about || format('%s %s has a step without a range: %s-%s/%s', names[i], item, parts[2], highest[i], parts[6]);
            END IF;
            IF i = 3 THEN
                earliest := least(earliest, bounds[1]);
            ELSIF i = 4 THEN
                FOR n IN bounds[1]..bounds[2] BY coalesce(parts[6]::integer, 1) LOOP
                    longest := greatest(longest, lengths[n]);
                END LOOP;
            END IF;
        END LOOP;
    END LOOP;
    -- Unless the day of week alone is enough: it is if neither field begins with *.
    IF earliest > longest AND (fields[3] LIKE '*%' OR fields[5] LIKE '*%') THEN
        RETURN about || format('it never comes: no month of %s has a day %s', fields[4], earliest);
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_cron_refusal(text) IS 'Why a cron text has no meaning by crontab(5), naming field and value; null: it has one. For build_schedules.';

CREATE OR REPLACE FUNCTION farm.build_schedules_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    zone text;
    moved boolean := true;
    refusal text;
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
        -- What is longer is refused by its CHECK afterwards.
        refusal := farm.build_cron_refusal(left(NEW.cron, 201));
        IF refusal IS NOT NULL THEN
            RAISE EXCEPTION '%', refusal USING
                ERRCODE = 'check_violation',
                HINT = 'Minute, hour, day of month, month, day of week: ''30 2 * * *'' is 02:30 each night, ''0 * * * *'' each hour, ''0 6 * * MON-FRI'' 06:00 on working days; or @hourly, @daily, @weekly, @monthly, @yearly.';
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
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon' OR pg_trigger_depth() > 0) EXECUTE FUNCTION farm.build_queue_ask();
CREATE OR REPLACE TRIGGER a_asked AFTER INSERT OR UPDATE OR DELETE ON farm.build_queue FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.lock_timeout', true) <> '') EXECUTE FUNCTION farm.build_queue_asked();
CREATE OR REPLACE TRIGGER a_refuse BEFORE UPDATE OR DELETE ON farm.build_queue FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon' OR pg_trigger_depth() > 0) EXECUTE FUNCTION farm.build_queue_refuse();
CREATE OR REPLACE TRIGGER a_delete AFTER DELETE ON farm.build_queue FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon' OR pg_trigger_depth() > 0) EXECUTE FUNCTION farm.build_queue_delete();
CREATE OR REPLACE TRIGGER a_truncate BEFORE TRUNCATE ON farm.build_queue FOR EACH STATEMENT EXECUTE FUNCTION farm.build_queue_truncate();
CREATE OR REPLACE TRIGGER build_queue_wake AFTER INSERT OR UPDATE ON farm.build_queue FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_queue_wake();
CREATE OR REPLACE TRIGGER a_locks BEFORE INSERT OR UPDATE OF locks ON farm.builders FOR EACH ROW WHEN (NEW.locks <> '{}') EXECUTE FUNCTION farm.builder_locks_known();
CREATE OR REPLACE TRIGGER a_unused BEFORE UPDATE OR DELETE ON farm.build_locks FOR EACH ROW EXECUTE FUNCTION farm.build_locks_unused();
CREATE OR REPLACE TRIGGER locks_changed AFTER INSERT OR UPDATE OR DELETE ON farm.build_locks FOR EACH STATEMENT EXECUTE FUNCTION farm.builders_changed();
CREATE OR REPLACE TRIGGER builders_changed AFTER INSERT OR UPDATE OR DELETE ON farm.builders FOR EACH STATEMENT EXECUTE FUNCTION farm.builders_changed();
-- A worker looks itself at what hangs on the builds that it ends.
CREATE OR REPLACE TRIGGER ended AFTER UPDATE OF state ON farm.builds FOR EACH ROW
    WHEN (farm.build_state_is_final(NEW.state) AND NOT farm.build_state_is_final(OLD.state)
          AND current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_ended();
CREATE OR REPLACE TRIGGER a_insert BEFORE INSERT ON farm.builds FOR EACH ROW EXECUTE FUNCTION farm.builds_insert();
CREATE OR REPLACE TRIGGER a_delete BEFORE DELETE ON farm.builds FOR EACH ROW EXECUTE FUNCTION farm.builds_delete();
CREATE OR REPLACE TRIGGER a_change BEFORE INSERT OR UPDATE ON farm.build_schedules FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_schedules_change();
CREATE OR REPLACE TRIGGER build_schedules_changed AFTER INSERT OR UPDATE OR DELETE ON farm.build_schedules FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION farm.build_schedules_changed();

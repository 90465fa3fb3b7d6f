-- What people call to steer the queue. None of them ever waits for a running build, nor for anybody's open transaction longer than a second.
--
-- SECURITY DEFINER, and not for everybody: who may call them needs no rights on the tables, and so cannot make up results, or change
-- what a builder runs. deploy/roles.sql grants all of them to operators, and to submitters those that steer a build of their own.

CREATE OR REPLACE FUNCTION farm.build_steered(id bigint) RETURNS farm.builds
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds;
BEGIN
    SELECT b.* INTO build FROM farm.builds b WHERE b.id = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no build %', $1 USING ERRCODE = 'no_data_found';
    END IF;
    IF NOT farm.build_is_for(build.submitted_by) THEN
        RAISE EXCEPTION 'build % was submitted by %: % may not steer it', $1, build.submitted_by, session_user USING
            ERRCODE = 'insufficient_privilege', HINT = 'Ask who submitted it, or an operator.';
    END IF;
    RETURN build;
END $$;
COMMENT ON FUNCTION farm.build_steered(bigint) IS 'A build that the person of this session may steer; refuses any other. Internal.';

CREATE OR REPLACE FUNCTION farm.build_held(id bigint) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    RAISE EXCEPTION 'build % is held by %', $1, farm.build_holder($1) USING
        ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended; SELECT pg_terminate_backend(PID); ends it.';
END $$;
COMMENT ON FUNCTION farm.build_held(bigint) IS 'Refuses to wait any longer for a build that an open transaction holds. Internal.';

CREATE OR REPLACE FUNCTION farm.build_cancel(id bigint, reason text, said text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds;
BEGIN
    -- The queue row before the builds row, as everybody; a locked one is claimed, and its worker is told.
    PERFORM FROM farm.build_queue q WHERE q.build_id = $1 FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        PERFORM FROM farm.builds b WHERE b.id = $1 AND b.state = 'queued' FOR NO KEY UPDATE;
        IF FOUND THEN
            UPDATE farm.builds b
            SET state = 'cancelled', finished_at = clock_timestamp(), detail = said, exit_code = NULL, term_signal = NULL,
                cancel_requested_at = coalesce(b.cancel_requested_at, clock_timestamp()), cancel_reason = coalesce(b.cancel_reason, $2)
            WHERE b.id = $1;
            PERFORM farm.build_leave_queue($1);
            RETURN 'cancelled';
        END IF;
    END IF;
    SELECT b.* INTO build FROM farm.builds b WHERE b.id = $1;
    IF build.state IN ('queued', 'running') THEN
        INSERT INTO farm.build_cancels (build_id, reason) VALUES ($1, $2);
        PERFORM pg_notify('build_control', 'cancel');
        RETURN CASE build.state WHEN 'running' THEN 'its worker is told to stop it' ELSE 'it will be cancelled as soon as its row is free' END;
    END IF;
    IF build.state = 'described' THEN
        UPDATE farm.builds b
        SET state = 'cancelled', queued_at = clock_timestamp(), finished_at = clock_timestamp(), detail = said,
            cancel_requested_at = clock_timestamp(), cancel_reason = reason
        WHERE b.id = $1 AND b.state = 'described';
        PERFORM farm.build_all_written(CASE WHEN EXISTS (SELECT FROM farm.builds b WHERE b.id = $1 AND b.state = 'described') THEN 'builds' END);
        RETURN 'cancelled';
    END IF;
    RETURN format('it had already ended: %s', build.state);
EXCEPTION WHEN lock_not_available THEN
    PERFORM farm.build_held($1);
END $$;
COMMENT ON FUNCTION farm.build_cancel(bigint, text, text) IS 'Cancels a build, whoever asks, and words it so. Internal.';

CREATE OR REPLACE FUNCTION farm.cancel_build(id bigint, reason text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM farm.build_steered($1);
    IF octet_length($2) > 10000 THEN
        RAISE EXCEPTION 'the reason has % bytes; at most 10000', octet_length($2) USING ERRCODE = 'check_violation';
    END IF;
    RETURN farm.build_cancel($1, $2, format('cancelled by %s', session_user) || coalesce(': ' || $2, ''));
END $$;
COMMENT ON FUNCTION farm.cancel_build(bigint, text) IS 'Cancels a build: at once while it waits; a running one is stopped by its worker within seconds. Says which. For who submitted it, and for operators.';

CREATE OR REPLACE FUNCTION farm.build_cancel_settle(id bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds;
BEGIN
    -- One that somebody holds is left for the next look.
    SELECT b.* INTO build FROM farm.builds b WHERE b.id = $1 AND b.cancel_requested_at IS NOT NULL FOR NO KEY UPDATE SKIP LOCKED;
    RETURN CASE WHEN FOUND THEN farm.build_cancel($1, build.cancel_reason, left(concat_ws(': ', 'cancelled', build.cancel_reason), 10000)) END;
END $$;
COMMENT ON FUNCTION farm.build_cancel_settle(bigint) IS 'Cancels a waiting build that somebody wanted cancelled while its row was locked. For workers, who may cancel nothing else.';

CREATE OR REPLACE FUNCTION farm.build_settle_some(start bigint, most integer, OUT settled bigint, OUT next bigint)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    waiting record;
    looked integer := 0;
BEGIN
    settled := 0;
    -- What a trigger of somebody's refuses only at COMMIT is no matter of the other builds either.
    SET CONSTRAINTS ALL IMMEDIATE;
    FOR waiting IN
        SELECT q.build_id, q.builder, q.coalesce_key, b.cancel_requested_at IS NOT NULL AS is_cancelled, b.id IS NOT NULL AS is_waiting,
               q.coalesce_key IS NOT NULL AND EXISTS (
                   -- Newer than a build that waits. Beside a build that runs there is nothing to supersede, and a row that is locked for nothing is
                   -- passed over by the INSERT of the next build.
                   SELECT FROM farm.build_queue o JOIN farm.builds w ON w.id = o.build_id AND w.state = 'queued'
                   WHERE o.builder = q.builder AND o.coalesce_key = q.coalesce_key AND o.build_id < q.build_id) AS is_newer
        FROM (SELECT w.build_id, w.builder, w.coalesce_key FROM farm.build_queue w WHERE w.build_id > coalesce(start, 0) ORDER BY w.build_id LIMIT most) q
        LEFT JOIN farm.builds b ON b.id = q.build_id AND b.state = 'queued' AND (q.coalesce_key IS NOT NULL OR b.cancel_requested_at IS NOT NULL)
        ORDER BY q.build_id
    LOOP
        looked := looked + 1;
        next := waiting.build_id;
        CONTINUE WHEN waiting.is_cancelled IS NOT TRUE AND NOT (waiting.is_newer AND waiting.is_waiting);
        BEGIN
            IF waiting.is_cancelled THEN
                PERFORM farm.build_cancel_settle(waiting.build_id);
            ELSE
                PERFORM farm.build_queue_supersede(waiting.builder, waiting.coalesce_key, waiting.build_id);
            END IF;
            settled := settled + 1;
        EXCEPTION WHEN OTHERS THEN
            PERFORM farm.build_refused(waiting.build_id, SQLERRM);
        END;
    END LOOP;
    IF looked < most THEN
        next := NULL;
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_settle_some(bigint, integer) IS 'Cancels waiting builds that somebody wants cancelled, and supersedes those that a newer build takes the place of, from a build on; says how many were settled and where to go on. For workers.';

CREATE OR REPLACE FUNCTION farm.retry_build(id bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds := farm.build_steered($1);
BEGIN
    IF build.state IN ('queued', 'running') THEN
        -- Between two tries it need not wait any longer. Locked first and looked at afterwards, as in prioritize_build.
        PERFORM FROM farm.build_queue q WHERE q.build_id = $1 AND q.run_after IS NOT NULL FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            UPDATE farm.build_queue q SET run_after = NULL
            WHERE q.build_id = $1 AND NOT EXISTS (SELECT FROM farm.builds b WHERE b.id = $1 AND b.state = 'running');
            IF FOUND THEN
                RETURN 'queued, to start at once';
            END IF;
        END IF;
        RETURN format('it is %s already', build.state);
    END IF;
    -- Somebody else may do the same at this moment.
    INSERT INTO farm.build_queue (build_id) VALUES ($1) ON CONFLICT DO NOTHING;
    RETURN CASE WHEN FOUND THEN 'queued' ELSE 'it is queued already' END;
END $$;
COMMENT ON FUNCTION farm.retry_build(bigint) IS 'Queues a build that has ended again, as its next attempt; one that waits for its next try starts at once. For who submitted it, and for operators.';

CREATE OR REPLACE FUNCTION farm.prioritize_build(id bigint, priority integer) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
    build farm.builds := farm.build_steered($1);
BEGIN
    -- A row may be free while its build runs: its worker has stepped aside for a moment, or lost its claim. The second statement sees
    -- what was committed before the lock.
    PERFORM FROM farm.build_queue q WHERE q.build_id = $1 FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        UPDATE farm.build_queue q SET priority = $2
        WHERE q.build_id = $1 AND NOT EXISTS (SELECT FROM farm.builds b WHERE b.id = $1 AND b.state = 'running');
        IF FOUND THEN
            RETURN format('priority %s', $2);
        END IF;
    END IF;
    SELECT b.* INTO build FROM farm.builds b WHERE b.id = $1;
    RETURN CASE WHEN build.state = 'queued' THEN 'it is about to start' ELSE format('it is %s', build.state) END;
END $$;
COMMENT ON FUNCTION farm.prioritize_build(bigint, integer) IS 'Changes the priority of a build that waits. For who submitted it, and for operators.';

CREATE OR REPLACE FUNCTION farm.pause_builder(name text, reason text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
BEGIN
    UPDATE farm.builders r SET paused = true, paused_reason = reason WHERE r.name = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no builder "%"', $1 USING ERRCODE = 'no_data_found', HINT = 'SELECT name FROM builders;';
    END IF;
    RETURN 'paused; what runs goes on';
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'builder "%" is held by somebody''s open transaction', $1 USING ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended.';
END $$;
COMMENT ON FUNCTION farm.pause_builder(text, text) IS 'Starts no more builds of this builder; what runs goes on.';

CREATE OR REPLACE FUNCTION farm.resume_builder(name text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
BEGIN
    UPDATE farm.builders r SET paused = false, paused_reason = NULL WHERE r.name = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no builder "%"', $1 USING ERRCODE = 'no_data_found', HINT = 'SELECT name FROM builders;';
    END IF;
    RETURN 'resumed';
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'builder "%" is held by somebody''s open transaction', $1 USING ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended.';
END $$;
COMMENT ON FUNCTION farm.resume_builder(text) IS 'Ends a pause.';

CREATE OR REPLACE FUNCTION farm.drain_worker(name text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
BEGIN
    UPDATE farm.workers w SET drain_requested = true WHERE w.name = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no worker "%"', $1 USING ERRCODE = 'no_data_found', HINT = 'SELECT worker FROM worker_status;';
    END IF;
    PERFORM pg_notify('build_control', 'drain');
    RETURN 'it claims nothing more, finishes what runs, and leaves';
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'worker "%" is held by somebody''s open transaction', $1 USING ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended.';
END $$;
COMMENT ON FUNCTION farm.drain_worker(text) IS 'Lets a worker finish what it runs and then leave.';

CREATE OR REPLACE FUNCTION farm.prune_builds(older_than interval) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_variable
DECLARE
    before timestamptz;
    began timestamptz := clock_timestamp();
    gone bigint := 0;
    kept jsonb := '{}';
    ids bigint[];
    last_at timestamptz := '-infinity';
    last_id bigint := -9223372036854775808;
    part record;
    held record;
BEGIN
    IF older_than IS NULL OR older_than < '0' THEN
        RAISE EXCEPTION 'prune_builds needs an age, for example prune_builds(''90 days'')' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    before := began - older_than;
    -- Some a call, the oldest first, so that no call holds anything up; what others hold is left for the next. Those that stay are passed by.
    LOOP
        SELECT array_agg(o.id ORDER BY o.finished_at, o.id), max(o.finished_at) INTO ids, last_at FROM (
            SELECT b.id, b.finished_at FROM farm.builds b
            WHERE b.finished_at < before AND b.finished_at >= last_at AND (b.finished_at, b.id) > (last_at, last_id)
              AND NOT EXISTS (SELECT FROM farm.build_queue q WHERE q.needs <> '{}' AND q.needs @> ARRAY[b.id])
            ORDER BY b.finished_at, b.id LIMIT 1000 FOR UPDATE SKIP LOCKED
        ) o;
        EXIT WHEN ids IS NULL;
        last_id := ids[cardinality(ids)];
        SELECT p.deleted, p.kept INTO part FROM farm.build_prune(ids) p;
        gone := gone + part.deleted;
        FOR held IN SELECT key, value::bigint AS builds FROM jsonb_each_text(part.kept) LOOP
            kept := kept || jsonb_build_object(held.key, held.builds + coalesce((kept ->> held.key)::bigint, 0));
        END LOOP;
        EXIT WHEN cardinality(ids) < 1000 OR gone >= 1000 OR (gone > 0 AND clock_timestamp() > began + interval '1 second');
    END LOOP;
    FOR held IN SELECT key, value FROM jsonb_each_text(kept) ORDER BY key LOOP
        RAISE NOTICE '% old builds stay: %', held.value, held.key;
    END LOOP;
    RETURN gone;
END $$;
COMMENT ON FUNCTION farm.prune_builds(interval) IS E'Deletes a thousand finished builds older than this, or some more, with attempts and logs, and says how many. What other tables refer to stays; a notice names them. Call it until it says 0 (in psql: \\watch).';

-- What triggers and daemons call works with the owner's rights, and asks nobody who they are.
REVOKE EXECUTE ON FUNCTION farm.build_cancel_settle(bigint), farm.build_cancel(bigint, text, text),
    farm.build_settle_some(bigint, integer) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION farm.cancel_build(bigint, text), farm.retry_build(bigint), farm.prioritize_build(bigint, integer), farm.pause_builder(text, text),
    farm.resume_builder(text), farm.drain_worker(text), farm.prune_builds(interval) FROM PUBLIC;

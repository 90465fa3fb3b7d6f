-- Builds that need others, and builds that take the place of others.
--
-- A result never waits for what hangs on it, and can't fail because of it: no trigger of builds looks at the queue. A worker settles what
-- hangs on a build right after the COMMIT that ended the build, level by level. Each poll finds the builds that this look missed.
-- SET enable_seqscan = off: 10,000 rows of one INSERT are in no statistics, and would be read whole for each of them.

CREATE OR REPLACE FUNCTION farm.build_all_written(dropped text) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF dropped IS NOT NULL THEN
        RAISE EXCEPTION 'a trigger on % drops what buildreactor writes there', dropped USING
            ERRCODE = 'triggered_action_exception',
            HINT = 'The function of a BEFORE INSERT OR UPDATE trigger must RETURN NEW, that of a BEFORE DELETE trigger RETURN OLD.';
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION farm.build_all_written(text) IS 'Refuses to go on where a trigger of somebody''s own has dropped or undone a write to this table; null: none has. Internal.';

CREATE OR REPLACE FUNCTION farm.build_leave_queue(id bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    is_gone boolean;
BEGIN
    DELETE FROM farm.build_queue q WHERE q.build_id = $1;
    is_gone := FOUND;
    PERFORM farm.build_all_written(CASE
        WHEN NOT is_gone THEN 'build_queue'
        WHEN NOT EXISTS (SELECT FROM farm.builds b WHERE b.id = $1 AND farm.build_state_is_final(b.state)) THEN 'builds'
    END);
END $$;
COMMENT ON FUNCTION farm.build_leave_queue(bigint) IS 'Takes a waiting build that has just ended out of the queue, and makes sure of both. Internal.';

CREATE OR REPLACE FUNCTION farm.build_needs_known(needs bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
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
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    levels jsonb[] := '{}';
    level bigint[] := wanted;
    seen bigint[] := '{}';
    way bigint[];
BEGIN
    -- Each build once, however many ways lead to it.
    PERFORM FROM (
        WITH RECURSIVE above AS (
            SELECT n AS at FROM unnest(wanted) AS n
            UNION
            SELECT m FROM above a JOIN farm.builds b ON b.id = a.at CROSS JOIN unnest(b.needs) AS m WHERE a.at <> id
        )
        SELECT FROM above a WHERE a.at = id) circle;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- There is one. A shortest way is for the message: up level by level, then back down.
    WHILE NOT id = ANY (level) AND level <> '{}' LOOP
        levels := levels || to_jsonb(level);
        seen := seen || level;
        level := ARRAY(SELECT DISTINCT m FROM farm.builds b CROSS JOIN unnest(b.needs) AS m WHERE b.id = ANY (level) AND NOT m = ANY (seen));
    END LOOP;
    way := ARRAY[id];
    FOR i IN REVERSE cardinality(levels) .. 1 LOOP
        SELECT b.id || way INTO way FROM farm.builds b
        WHERE b.id IN (SELECT n::bigint FROM jsonb_array_elements_text(levels[i]) AS n) AND way[1] = ANY (b.needs) ORDER BY b.id LIMIT 1;
    END LOOP;
    RAISE EXCEPTION 'needs go round in a circle: %', CASE WHEN cardinality(way) <= 20 THEN array_to_string(id || way, ' needs ')
        ELSE array_to_string(id || way[1:5], ' needs ') || ' needs ... needs ' || id END USING ERRCODE = 'check_violation';
END $$;
COMMENT ON FUNCTION farm.build_needs_acyclic(bigint, bigint[]) IS 'Refuses needs that lead back to the build itself.';

CREATE OR REPLACE FUNCTION farm.build_needs_open(needs bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
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
    -- The planner expects many rows from a recursive query, and would have it compiled.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    row farm.build_queue;
    open_needs bigint[];
    broken farm.builds;
BEGIN
    -- A row that somebody holds is left for the next look.
    SELECT * INTO row FROM farm.build_queue q WHERE q.build_id = waiting AND q.needs <> '{}' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    open_needs := farm.build_needs_open(row.needs);
    -- A need may have passed or been superseded since the statement before. Whoever ended that need settles this build.
    SELECT b.* INTO broken FROM farm.builds b
    WHERE b.id = ANY (open_needs) AND farm.build_state_is_final(b.state) AND b.state NOT IN ('passed', 'superseded') ORDER BY b.id LIMIT 1;
    IF FOUND THEN
        PERFORM FROM farm.builds b WHERE b.id = waiting AND b.state IN ('described', 'queued') FOR NO KEY UPDATE SKIP LOCKED;
        -- A build that has begun in spite of its needs is left alone: its result looks up the queue row.
        IF NOT FOUND THEN
            RETURN;
        END IF;
        UPDATE farm.builds b
        SET state = 'skipped', finished_at = clock_timestamp(), exit_code = NULL, term_signal = NULL,
            detail = format('needs build %s, which ended %s', broken.id, broken.state)
        WHERE b.id = waiting;
        PERFORM farm.build_leave_queue(waiting);
    ELSIF open_needs <> row.needs THEN
        UPDATE farm.build_queue q SET needs = open_needs WHERE q.build_id = waiting RETURNING q.needs INTO row.needs;
        PERFORM farm.build_all_written(CASE WHEN row.needs IS DISTINCT FROM open_needs THEN 'build_queue' END);
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_needs_settle(bigint) IS 'Looks at the needs of a waiting build: releases it when all have passed, skips it when one has ended otherwise. Waits for nobody. For workers.';

CREATE OR REPLACE FUNCTION farm.build_refused(id bigint, why text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    -- Said once: it is refused again at each look.
    UPDATE farm.builds b SET detail = left('the database refuses to end or release it: ' || why, 2000)
    WHERE b.id = $1 AND b.state = 'queued' AND b.detail IS DISTINCT FROM left('the database refuses to end or release it: ' || why, 2000);
EXCEPTION WHEN OTHERS THEN
    -- Not even that may be written.
    NULL;
END $$;
COMMENT ON FUNCTION farm.build_refused(bigint, text) IS 'Says in the row of a waiting build why the database refuses to end or release it. Internal.';

CREATE OR REPLACE FUNCTION farm.build_needs_follow(ended bigint[], seconds double precision, OUT settled bigint, OUT left_over bigint[])
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_variable
DECLARE
    stop_at timestamptz := clock_timestamp() + make_interval(secs => seconds);
    batch bigint[];
    waiting bigint;
    names bigint[];
    is_stuck boolean;
    is_refused boolean;
BEGIN
    settled := 0;
    left_over := '{}';
    -- What a trigger of somebody's refuses only at COMMIT is no matter of the other builds either.
    SET CONSTRAINTS ALL IMMEDIATE;
    -- The loop takes a hundred ended builds at a time, so that each search in the index has few keys whatever the shape of the needs.
    WHILE ended <> '{}' LOOP
        batch := ended[1:100];
        is_stuck := false;
        FOR waiting IN
            SELECT DISTINCT q.build_id FROM unnest(batch) AS e(id)
            CROSS JOIN LATERAL (SELECT w.build_id FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[e.id]) q
            ORDER BY q.build_id
        LOOP
            -- At least one build is settled in each call: a new session may need all the time to plan these statements.
            IF settled > 0 AND clock_timestamp() > stop_at THEN
                left_over := left_over || ended;
                RETURN;
            END IF;
            -- What the row of one build, or a trigger of somebody's, refuses is no matter of the others.
            is_refused := false;
            BEGIN
                PERFORM farm.build_needs_settle(waiting);
            EXCEPTION WHEN OTHERS THEN
                is_refused := true;
                PERFORM farm.build_refused(waiting, SQLERRM);
            END;
            CONTINUE WHEN is_refused;
            -- The row is looked up by its primary key alone: the index on needs would be walked for all rows that name the same build.
            SELECT q.needs INTO names FROM farm.build_queue q WHERE q.build_id = waiting;
            IF names && batch THEN
                is_stuck := true;
            ELSE
                settled := settled + 1;
                IF EXISTS (SELECT FROM farm.builds b WHERE b.id = waiting AND b.state = 'skipped')
                   AND EXISTS (SELECT FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[waiting]) THEN
                    ended := ended || waiting;
                END IF;
            END IF;
        END LOOP;
        IF is_stuck THEN
            left_over := left_over || batch;
        END IF;
        ended := ended[cardinality(batch) + 1:];
    END LOOP;
END $$;
COMMENT ON FUNCTION farm.build_needs_follow(bigint[], double precision) IS 'Settles what hangs on builds that have ended, through any depth, for about so many seconds. Says how many it settled, and which ended builds something may still hang on: there was no time, or somebody holds a row. For workers.';

CREATE OR REPLACE FUNCTION farm.build_ended() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET gin_fuzzy_search_limit = 0 AS $$
#variable_conflict use_variable
BEGIN
    IF EXISTS (SELECT FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[NEW.id]) THEN
        PERFORM pg_notify('build_control', 'ended');
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_ended() IS 'Trigger: tells the workers when a person has ended a build that others need.';

CREATE OR REPLACE FUNCTION farm.build_queue_coalesce(builder text, coalesce_key text, newest bigint, priority integer, run_after timestamptz, needs bigint[], own text) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    older farm.build_queue;
BEGIN
    -- SKIP LOCKED: a row that is claimed runs, and is never touched.
    FOR older IN
        SELECT q.* FROM farm.build_queue q
        WHERE q.builder = $1 AND q.coalesce_key = $2 AND q.build_id <> $3
          -- A worker tells what is newer by the number; an INSERT is newer than all that it sees.
          AND (own IS NOT NULL OR q.build_id < $3)
          -- The newest must not start later than what it replaces: not for its time, nor for builds that it alone needs. But a role may put off
          -- what it has put off itself: each push then waits anew for some quiet minutes.
          AND (coalesce($5, '-infinity') <= greatest(coalesce(q.run_after, '-infinity'), clock_timestamp())
               OR q.run_after > clock_timestamp() AND EXISTS (
                   SELECT FROM farm.builds o JOIN farm.builds n ON n.submitted_by = o.submitted_by WHERE o.id = q.build_id AND n.id = $3))
          AND $6 <@ farm.build_needs_open(q.needs)
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
        PERFORM FROM farm.builds b WHERE b.id = older.build_id AND b.state = 'queued' AND (own IS NULL OR b.submitted_by = own) FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            UPDATE farm.builds b
            SET state = 'superseded', superseded_by = newest, finished_at = clock_timestamp(), exit_code = NULL, term_signal = NULL,
                detail = (SELECT concat_ws(' of ', 'superseded by build ' || newest, nullif(n.queued_by, b.submitted_by)) FROM farm.builds n WHERE n.id = newest)
            WHERE b.id = older.build_id;
            PERFORM farm.build_leave_queue(older.build_id);
            -- The newest build keeps the highest priority that somebody gave to one of them.
            priority := greatest(priority, older.priority);
        END IF;
    END LOOP;
    RETURN priority;
END $$;
COMMENT ON FUNCTION farm.build_queue_coalesce(text, text, bigint, integer, timestamptz, bigint[], text) IS 'Ends the other waiting builds of the builder and key that would not have started before the newest one, with own those of that role alone, and comes back with the highest priority of them all.';

CREATE OR REPLACE FUNCTION farm.build_queue_supersede(builder text, coalesce_key text, newest bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    new farm.build_queue;
    best integer;
BEGIN
    SELECT * INTO new FROM farm.build_queue q WHERE q.build_id = newest AND q.coalesce_key = $2 FOR UPDATE SKIP LOCKED;
    -- A claimed row belongs to a build that has begun. The builds that wait beside it are left to a later look.
    IF FOUND THEN
        best := farm.build_queue_coalesce(new.builder, new.coalesce_key, newest, new.priority, new.run_after, new.needs, NULL);
        IF best > new.priority THEN
            UPDATE farm.build_queue q SET priority = best WHERE q.build_id = newest;
        END IF;
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_queue_supersede(text, text, bigint) IS 'Ends the other waiting builds of the builder and key that the newest takes the place of. For workers.';

-- Whoever may call these steers other people's builds.
REVOKE EXECUTE ON FUNCTION farm.build_needs_settle(bigint), farm.build_needs_follow(bigint[], double precision), farm.build_queue_supersede(text, text, bigint),
    farm.build_queue_coalesce(text, text, bigint, integer, timestamptz, bigint[], text) FROM PUBLIC;

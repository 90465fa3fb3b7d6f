-- Advisory locks: what they are, who has them, and those that the server itself takes. src/database/keys.rs has the same numbers.

CREATE OR REPLACE VIEW farm.build_advisory_locks AS
WITH ours AS MATERIALIZED (
    -- By their types: a name of a schema is not always one in a text.
    SELECT (SELECT t.typrelid FROM pg_type t WHERE t.oid = pg_typeof(NULL::farm.build_queue)) AS queue,
           (SELECT t.typrelid FROM pg_type t WHERE t.oid = pg_typeof(NULL::farm.build_attempts)) AS attempts,
           (SELECT t.typrelid FROM pg_type t WHERE t.oid = pg_typeof(NULL::farm.build_schema_history)) AS history
), locks AS MATERIALIZED (
    SELECT l.locktype, l.classid::bigint AS class, l.objid::bigint AS key, l.objsubid, l.relation, l.mode, l.pid FROM pg_locks l
    WHERE l.granted AND l.locktype IN ('advisory', 'relation') AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
), named AS (
    SELECT CASE WHEN l.class BETWEEN 733512905 AND 1233512904 AND l.key BETWEEN 417066219 AND 417067218 THEN 'slot'
                WHEN l.class BETWEEN 1233512905 AND 1733512904 AND l.key BETWEEN 958204352 AND 958205351 THEN 'unit'
                WHEN l.class = 2041775263 THEN 'name'
                WHEN l.class = 2041775264 THEN 'coalesce'
                WHEN l.class = 2041775265 THEN 'ask'
                WHEN l.class = 2041775266 THEN 'mail'
                WHEN l.class = 2041775267 AND l.key = 318804951 THEN 'migrate'
                WHEN l.class = 2041775267 AND l.key = 318804952 THEN 'retention'
           END AS kind, l.class, l.key, l.pid
    FROM locks l WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.class BETWEEN 733512905 AND 2041775267
)
SELECT n.kind,
       CASE n.kind WHEN 'slot' THEN n.class - 733512904 WHEN 'unit' THEN n.class - 1233512904 END::integer AS number,
       CASE n.kind WHEN 'slot' THEN n.key - 417066218 WHEN 'unit' THEN n.key - 958204351
                   WHEN 'migrate' THEN NULL WHEN 'retention' THEN NULL
                   -- As hashtext() has it, with a sign.
                   ELSE n.key - CASE WHEN n.key > 2147483647 THEN 4294967296 ELSE 0 END END::integer AS part,
       n.pid,
       a.usename::text AS role,
       a.application_name AS application,
       format('role %s (process %s, application %s)', coalesce(a.usename, 'unknown'), n.pid, coalesce(nullif(a.application_name, ''), 'unnamed')) AS holder,
       coalesce(CASE n.kind
           WHEN 'coalesce' THEN has_table_privilege(a.usesysid, o.queue, 'INSERT')
           WHEN 'ask' THEN has_table_privilege(a.usesysid, o.queue, 'UPDATE, DELETE')
           WHEN 'migrate' THEN has_table_privilege(a.usesysid, o.history, 'INSERT')
           ELSE (has_table_privilege(a.usesysid, o.attempts, 'INSERT')
                 -- One that does not inherit the right has it by SET ROLE.
                 OR EXISTS (SELECT FROM pg_roles r WHERE pg_has_role(a.usesysid, r.oid, 'MEMBER') AND has_table_privilege(r.oid, o.attempts, 'INSERT')))
                -- A claim also has a row of the queue, but for the moment in which it steps aside.
                AND (n.kind NOT IN ('slot', 'unit') OR a.application_name LIKE 'buildreactor % claim'
                     OR EXISTS (SELECT FROM locks q WHERE q.pid = n.pid AND q.relation = o.queue AND q.mode = 'RowShareLock'))
       END, false) AS ours
FROM named n CROSS JOIN ours o LEFT JOIN pg_stat_activity a ON a.pid = n.pid
WHERE n.kind IS NOT NULL;
COMMENT ON VIEW farm.build_advisory_locks IS 'The advisory locks of this database that mean something to buildreactor, and who has them. Those of others count for nothing; they are named where they are in the way.';
COMMENT ON COLUMN farm.build_advisory_locks.kind IS 'slot of a builder, unit of a row of build_locks, name of a worker, coalesce (an INSERT with coalesce_key), ask (an UPDATE or DELETE that may wait for a worker), mail (counting those of an address), migrate, retention.';
COMMENT ON COLUMN farm.build_advisory_locks.number IS 'slot: builders.number. unit: build_locks.number.';
COMMENT ON COLUMN farm.build_advisory_locks.part IS 'Which slot or unit, from 1. name, mail, coalesce: hash of it. ask: the process.';
COMMENT ON COLUMN farm.build_advisory_locks.pid IS 'Process of the server that has it (pg_stat_activity.pid).';
COMMENT ON COLUMN farm.build_advisory_locks.role IS 'Role of its session.';
COMMENT ON COLUMN farm.build_advisory_locks.application IS 'What its session calls itself.';
COMMENT ON COLUMN farm.build_advisory_locks.holder IS 'The session in words.';
COMMENT ON COLUMN farm.build_advisory_locks.ours IS 'Whether its session is of a role, and does what goes with the lock, as those do that take it for buildreactor.';

CREATE OR REPLACE FUNCTION farm.build_coalesce_lock(builder text, coalesce_key text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    hash integer := hashtext(builder || ' ' || coalesce_key);
    holder text;
    -- How many this transaction has tried: each takes room in the server's lock table, which is small and everybody's.
    tries integer := coalesce(nullif(current_setting('buildreactor.coalesce_locks', true), ''), '0')::integer;
BEGIN
    IF tries >= 64 THEN
        RETURN;
    END IF;
    PERFORM set_config('buildreactor.coalesce_locks', (tries + 1)::text, true);
    -- One INSERT of a key at a time, or two would not see each other's row. Somebody's open transaction may keep it for hours: those that
    -- were not seen are superseded by a daemon then (settle.sql). A statement of many rows waits once.
    FOR tried IN 0..CASE WHEN current_setting('buildreactor.coalesce', true) = 'waited' THEN 0 ELSE 40 END LOOP
        IF tried > 0 THEN
            PERFORM pg_sleep(0.02);
        END IF;
        IF pg_try_advisory_xact_lock(2041775264, hash) THEN
            RETURN;
        END IF;
    END LOOP;
    IF current_setting('buildreactor.coalesce', true) IS DISTINCT FROM 'waited' THEN
        PERFORM set_config('buildreactor.coalesce', 'waited', true);
        SELECT l.holder INTO holder FROM farm.build_advisory_locks l WHERE l.kind = 'coalesce' AND l.part = hash LIMIT 1;
        RAISE NOTICE 'the coalesce_key "%" of builder "%" is in use by %: what this build replaces is superseded later', coalesce_key, builder, coalesce(holder, 'a transaction that has ended');
    END IF;
END $$;
COMMENT ON FUNCTION farm.build_coalesce_lock(text, text) IS 'For the trigger of build_queue: one INSERT of a builder and key at a time, until the end of its transaction; waits for others for less than a second.';
REVOKE EXECUTE ON FUNCTION farm.build_coalesce_lock(text, text) FROM PUBLIC;

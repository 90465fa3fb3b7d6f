-- Deletes the logs of some builds that finished long ago; says how many rows went, and up to which build this looked. Null: there
-- are no more logs.
-- $1 bigint  after this build    $2 float8  age in seconds    $3 bigint  how many builds with logs to look at
-- Goes from build to build by the primary key of build_log, so builds without logs cost nothing.
-- Locks: those builds (FOR NO KEY UPDATE, none waited for: one that is queued again is left alone) and the rows deleted, until
-- the end of this statement.
WITH RECURSIVE logged AS (
    SELECT (SELECT min(l.build_id) FROM farm.build_log l WHERE l.build_id > $1) AS build_id, 1::bigint AS n
    UNION ALL
    SELECT (SELECT min(l.build_id) FROM farm.build_log l WHERE l.build_id > g.build_id), g.n + 1
    FROM logged g WHERE g.build_id IS NOT NULL AND g.n < $3
), old AS MATERIALIZED (
    SELECT b.id FROM farm.builds b
    WHERE b.id = ANY (ARRAY(SELECT build_id FROM logged)) AND b.finished_at < clock_timestamp() - make_interval(secs => $2::float8)
    FOR NO KEY UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM farm.build_log WHERE build_id = ANY (ARRAY(SELECT id FROM old)) RETURNING 1
)
SELECT (SELECT count(*) FROM deleted) AS deleted, (SELECT max(build_id) FROM logged) AS reached

-- Settles what was to happen to waiting builds at a moment when their row was locked, or in sight of nobody: those that somebody wants
-- cancelled, and those that a newer build of their coalesce_key takes the place of. Comes back with how many were looked at, and with builds that
-- have ended and that others need: for build_needs_follow.
-- $1 integer  at most so many of each
-- Locks: those queue rows and their builds, for the length of this statement; waits for nobody.
WITH cancelled AS MATERIALIZED (
    SELECT farm.build_cancel_settle(c.id) AS said FROM (
        SELECT b.id FROM farm.builds b WHERE b.cancel_requested_at IS NOT NULL AND b.state = 'queued' ORDER BY b.id LIMIT $1::integer
    ) c
), superseded AS MATERIALIZED (
    -- The newest need not be the one that may: it may be for later.
    SELECT farm.build_queue_supersede(k.builder, k.coalesce_key, k.build_id) FROM (
        SELECT q.builder, q.coalesce_key, q.build_id, row_number() OVER newest_first AS place, count(*) OVER (PARTITION BY q.builder, q.coalesce_key) AS rows
        FROM farm.build_queue q JOIN farm.builds b ON b.id = q.build_id
        WHERE q.coalesce_key IS NOT NULL AND b.state = 'queued'
        WINDOW newest_first AS (PARTITION BY q.builder, q.coalesce_key ORDER BY q.build_id DESC)
    ) k
    WHERE k.rows > 1 AND k.place < least(k.rows, 10) LIMIT $1::integer
)
SELECT (SELECT count(*) FROM cancelled) + (SELECT count(*) FROM superseded) AS settled

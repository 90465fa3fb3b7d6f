-- Moves requests to cancel to the builds that they are about. The first request of a build counts; a request for a build that has ended is
-- forgotten. A request whose move a trigger of somebody's own drops stays, and the next look tries again.
-- Locks: those requests and builds, for the length of this statement; waits for nobody.
WITH asked AS MATERIALIZED (
    SELECT c.id, c.build_id, c.requested_at, c.reason, b.state IN ('queued', 'running') AS is_open
    FROM farm.build_cancels c JOIN farm.builds b ON b.id = c.build_id
    ORDER BY c.id LIMIT 1000 FOR UPDATE OF c SKIP LOCKED FOR NO KEY UPDATE OF b SKIP LOCKED
), first AS MATERIALIZED (
    SELECT DISTINCT ON (a.build_id) a.build_id, a.requested_at, a.reason FROM asked a WHERE a.is_open ORDER BY a.build_id, a.id
), moved AS (
    UPDATE farm.builds b
    SET cancel_requested_at = coalesce(b.cancel_requested_at, f.requested_at), cancel_reason = CASE WHEN b.cancel_requested_at IS NULL THEN f.reason ELSE b.cancel_reason END
    FROM first f WHERE b.id = f.build_id
    RETURNING b.id, b.cancel_requested_at
)
DELETE FROM farm.build_cancels c
WHERE c.id = ANY (ARRAY(
    SELECT a.id FROM asked a WHERE NOT a.is_open OR EXISTS (SELECT FROM moved m WHERE m.id = a.build_id AND m.cancel_requested_at IS NOT NULL)))

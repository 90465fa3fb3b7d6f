-- Settles waiting builds whose needs have ended without them: a need that ended while the INSERT of the build that needs it had
-- not committed yet could not see it. Likewise builds that were to be cancelled, or superseded, at a moment when their row was
-- locked. $1 integer  at most so many of each
-- Locks: those queue rows and their builds, for the length of this statement.
SELECT count(farm.build_needs_settle(n.build_id)) AS settled FROM (
    SELECT q.build_id FROM farm.build_queue q
    WHERE q.needs <> '{}' AND EXISTS (SELECT FROM farm.builds b WHERE b.id = ANY (q.needs) AND farm.build_state_is_final(b.state))
    ORDER BY q.build_id LIMIT $1::integer
) n
UNION ALL
SELECT count(farm.build_cancel_settle(c.id)) FROM (
    SELECT b.id FROM farm.builds b WHERE b.cancel_requested_at IS NOT NULL AND b.state = 'queued' ORDER BY b.id LIMIT $1::integer
) c
UNION ALL
SELECT count(farm.build_queue_supersede(k.builder, k.coalesce_key, k.newest)) FROM (
    SELECT q.builder, q.coalesce_key, max(q.build_id) AS newest FROM farm.build_queue q JOIN farm.builds b ON b.id = q.build_id
    WHERE q.coalesce_key IS NOT NULL AND b.state = 'queued'
    GROUP BY q.builder, q.coalesce_key HAVING count(*) > 1 LIMIT $1::integer
) k

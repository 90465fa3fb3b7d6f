-- Builds that say running while no transaction holds their queue row: their worker died, or lost its connection. And (held) those that a
-- program older than build_attempts.lease holds: it has other advisory locks for their slots than we look for.
-- A row may appear falsely for an instant (its COMMIT falls between our snapshot and our look at the locks), so whoever acts
-- on it locks the row first and looks again.
SELECT b.id AS build_id, b.attempt, b.worker, b.builder, coalesce(a.slot, 0) AS slot, a.claims,
       extract(epoch FROM a.lease)::float8 AS lease_seconds, h.held
FROM farm.builds b JOIN farm.build_queue q ON q.build_id = b.id JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
CROSS JOIN LATERAL (SELECT q.xmax IN (SELECT l.transactionid FROM pg_locks l WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted) AS held) h
WHERE b.state = 'running' AND (NOT h.held OR a.lease IS NULL)
ORDER BY b.id

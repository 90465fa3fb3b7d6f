-- Builds that say running while no transaction holds their queue row: their worker died, or lost its connection.
-- A row may appear falsely for an instant (its COMMIT falls between our snapshot and our look at the locks), so whoever acts
-- on it locks the row first and looks again.
SELECT b.id AS build_id, b.attempt, b.worker, b.builder, coalesce(a.slot, 0) AS slot, a.claims
FROM farm.builds b JOIN farm.build_queue q ON q.build_id = b.id JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
WHERE b.state = 'running'
  AND q.xmax NOT IN (SELECT l.transactionid FROM pg_locks l WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted)
ORDER BY b.id

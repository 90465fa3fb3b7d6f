-- Claims the first of the candidates that is still there, ready and not locked.
-- $1 bigint[]  candidates, by id
-- Locks: the queue row alone (FOR UPDATE). Reads no other table: a claim that had touched builds or builders would make an
-- ALTER TABLE on them, and every statement behind that, wait for the whole build.
-- Without a slot no row is locked, not even for a moment: whoever coalesces takes a locked row for a running one.
-- coalesce hides from the planner that the partial index on ready rows would do too: with a table of dead rows its estimates
-- mean nothing, and that index would be walked through all of them (57 ms instead of 0.5 ms behind 100,000).
SELECT build_id FROM farm.build_queue WHERE build_id = ANY ($1) AND coalesce(ready, false)
  AND current_setting('buildreactor.slot', true) <> ''
ORDER BY priority DESC, build_id LIMIT 1 FOR UPDATE SKIP LOCKED

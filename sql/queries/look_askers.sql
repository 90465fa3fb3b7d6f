-- Builds of a worker whose queue row a person's UPDATE or DELETE waits for (see build_queue_ask): the worker steps aside for a
-- moment, so that the statement gets an answer. Whoever merely locks the row (SELECT ... FOR UPDATE) is not among them.
-- $1 text  worker    $2 bigint  class of their advisory locks
WITH asking AS MATERIALIZED (
    SELECT w.pid, w.transactionid FROM pg_locks w
    WHERE w.locktype = 'transactionid' AND NOT w.granted
      AND EXISTS (SELECT FROM pg_locks a WHERE a.pid = w.pid AND a.locktype = 'advisory' AND a.classid::bigint = $2 AND a.objsubid = 2)
)
SELECT b.id AS build_id, b.attempt FROM asking a JOIN farm.build_queue q ON q.xmax = a.transactionid JOIN farm.builds b ON b.id = q.build_id
WHERE b.worker = $1 AND b.state = 'running'

-- Locks the queue row of an attempt that runs without its claim, or that lost its worker.
-- $1 bigint  build
-- Locks: the queue row alone (FOR UPDATE); ready or not, an attempt was started from it.
SELECT build_id FROM farm.build_queue WHERE build_id = $1 FOR UPDATE SKIP LOCKED

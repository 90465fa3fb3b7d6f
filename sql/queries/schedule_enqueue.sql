-- Queues the build of a schedule that this transaction has locked.
-- $1 text  name
INSERT INTO farm.build_queue (builder, properties, reason)
SELECT builder, properties, 'schedule ' || name FROM farm.build_schedules WHERE name = $1
RETURNING build_id

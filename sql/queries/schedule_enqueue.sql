-- Queues the build of a schedule that this transaction has locked.
-- $1 text  name
INSERT INTO build_queue (builder, properties, reason)
SELECT builder, properties, 'schedule ' || name FROM build_schedules WHERE name = $1
RETURNING build_id

-- Builders that a worker with these labels may run.
-- $1 text[]  labels of the worker
SELECT name, number, max_running FROM builders WHERE NOT paused AND labels <@ $1 ORDER BY name

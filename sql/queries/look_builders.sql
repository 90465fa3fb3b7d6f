-- Builders that a worker with these labels may run.
-- $1 text[]  labels of the worker
SELECT name, number, max_running, locks, executor, settings::text AS settings,
       ARRAY(SELECT l.number FROM farm.build_locks l WHERE l.name = ANY (locks) ORDER BY l.name) AS lock_numbers,
       ARRAY(SELECT l.capacity FROM farm.build_locks l WHERE l.name = ANY (locks) ORDER BY l.name) AS lock_capacities
FROM farm.builders WHERE NOT paused AND labels <@ $1 ORDER BY name

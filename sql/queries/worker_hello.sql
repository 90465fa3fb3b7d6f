-- A worker reports in, at its start and each time it looks at everything.
-- $1 name  $2 host  $3 pid  $4 version  $5 slots  $6 labels  $7 builders  $8 state  $9 detail  $10 id of this run of the daemon
-- $11 accepting  $12 id of its folder  $13 jsonb: builders whose builds it cannot start at the moment, each with the reason
-- $14 float8, $15 float8  [lease] lease and grace, seconds
-- Comes back: how many other workers are not stopped. Asking for the queue's usage lets PostgreSQL forget a listener that
-- stopped reading; else a full notification queue would make every INSERT fail at COMMIT.
WITH hello AS (
    INSERT INTO farm.workers AS w (name, host, pid, version, slots, labels, builders, state, detail, accepting, folder, unready, run, lease, grace)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $11, $12, $13, $10, make_interval(secs => $14::float8), make_interval(secs => $15::float8))
    ON CONFLICT (name) DO UPDATE
    SET host = excluded.host, pid = excluded.pid, version = excluded.version, slots = excluded.slots, labels = excluded.labels,
        builders = excluded.builders, state = excluded.state, detail = excluded.detail, accepting = excluded.accepting, folder = excluded.folder, unready = excluded.unready, run = excluded.run,
        lease = excluded.lease, grace = excluded.grace,
        seen_at = clock_timestamp(),
        started_at = CASE WHEN w.run = excluded.run THEN w.started_at ELSE clock_timestamp() END,
        -- Asked of the daemon before, if this one has just come.
        drain_requested = w.drain_requested AND coalesce(w.run = excluded.run, false)
    -- A goodbye that comes late is not the next daemon's.
    WHERE excluded.state <> 'stopped' OR w.run = excluded.run
    RETURNING w.drain_requested
)
SELECT count(*) AS others, pg_notification_queue_usage() AS notification_queue,
       (SELECT bool_or(drain_requested) FROM hello) AS drain FROM farm.workers WHERE name <> $1 AND state <> 'stopped'

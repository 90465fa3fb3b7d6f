-- A worker reports in, at its start and each time it looks at everything.
-- $1 name  $2 host  $3 pid  $4 version  $5 slots  $6 labels  $7 builders  $8 state  $9 detail  $10 boolean: it has just started
-- $11 accepting  $12 id of its folder  $13 jsonb: builders whose builds it cannot start at the moment, each with the reason
-- Comes back: how many other workers are not stopped. Asking for the queue's usage lets PostgreSQL forget a listener that
-- stopped reading; else a full notification queue would make every INSERT fail at COMMIT.
WITH hello AS (
    INSERT INTO workers AS w (name, host, pid, version, slots, labels, builders, state, detail, accepting, folder, unready)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $11, $12, $13)
    ON CONFLICT (name) DO UPDATE
    SET host = excluded.host, pid = excluded.pid, version = excluded.version, slots = excluded.slots, labels = excluded.labels,
        builders = excluded.builders, state = excluded.state, detail = excluded.detail, accepting = excluded.accepting, folder = excluded.folder, unready = excluded.unready,
        seen_at = clock_timestamp(),
        started_at = CASE WHEN $10 THEN clock_timestamp() ELSE w.started_at END,
        -- Asked of the daemon before; this one has just come.
        drain_requested = w.drain_requested AND NOT $10
    RETURNING w.drain_requested
)
SELECT count(*) AS others, pg_notification_queue_usage() AS notification_queue,
       (SELECT bool_or(drain_requested) FROM hello) AS drain FROM workers WHERE name <> $1 AND state <> 'stopped'

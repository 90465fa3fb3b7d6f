-- Makes an attempt visible before its first process runs. Runs in a short transaction of its own, while the claim's
-- transaction holds the queue row. No row comes back when the builder no longer allows it, or when somebody holds the row in builds:
-- see begin_refusal.sql.
-- $1 bigint  build    $2 text  worker    $3 integer  builder slot held    $4 text[]  labels of the worker
-- $5 text[]  units of build_locks held    $6 text  id of the worker's folder    $7 text  id of its machine's boot
-- $8 float8  the lease that its processes are given, seconds
-- Locks: the builds row, for the length of this statement; waits for nobody.
-- What runs is found through the newest attempt of a slot: behind a long claim an index of what runs is full of dead entries.
WITH free AS MATERIALIZED (
    SELECT b.id FROM farm.builds b
    WHERE b.id = $1 AND b.state IN ('described', 'queued') AND b.cancel_requested_at IS NULL FOR NO KEY UPDATE SKIP LOCKED
), builder AS MATERIALIZED (
    SELECT r.* FROM free JOIN farm.build_queue q ON q.build_id = free.id JOIN farm.builders r ON r.name = q.builder
    WHERE q.ready AND NOT r.paused AND r.labels <@ $4
      -- A running build keeps its slot when its claim is lost for a while, and with it the lock on the slot.
      AND NOT EXISTS (SELECT FROM (SELECT a.state FROM farm.build_attempts a WHERE a.builder = r.name AND a.slot = $3
                                   ORDER BY a.started_at DESC LIMIT 1) last WHERE last.state = 'running')
      -- Likewise the units of its locks.
      AND NOT EXISTS (SELECT FROM farm.builds x JOIN farm.build_attempts a ON a.build_id = x.id AND a.attempt = x.attempt
                      WHERE $5::text[] <> '{}' AND x.state = 'running' AND a.lock_units && $5)
      -- Nor was a lock added since the claim.
      AND cardinality(r.locks) = cardinality($5)
      -- Builds in slots above this one count as well as the slots below it: neither those above a limit that was lowered nor the
      -- others may come to more than the limit together. No other claim has this slot, so this holds side by side too.
      AND $3 + (
          WITH RECURSIVE above(slot) AS (
              SELECT (SELECT min(a.slot) FROM farm.build_attempts a WHERE a.builder = r.name AND a.slot > $3)
              UNION ALL
              SELECT (SELECT min(a.slot) FROM farm.build_attempts a WHERE a.builder = r.name AND a.slot > above.slot) FROM above
              WHERE above.slot IS NOT NULL
          )
          SELECT count(*) FROM above CROSS JOIN LATERAL (
              SELECT a.state FROM farm.build_attempts a WHERE a.builder = r.name AND a.slot = above.slot ORDER BY a.started_at DESC LIMIT 1) last
          WHERE last.state = 'running') <= r.max_running
      -- Likewise the units of each lock, and its capacity.
      AND NOT EXISTS (
          SELECT FROM unnest($5::text[]) AS held
          CROSS JOIN LATERAL (SELECT split_part(held, '#', 1) AS name, split_part(held, '#', 2)::integer AS unit) u
          JOIN farm.build_locks l ON l.name = u.name
          WHERE u.unit + (SELECT count(*) FROM farm.builds x JOIN farm.build_attempts a ON a.build_id = x.id AND a.attempt = x.attempt
                          CROSS JOIN unnest(a.lock_units) AS other
                          WHERE x.state = 'running' AND split_part(other, '#', 1) = u.name AND split_part(other, '#', 2)::integer > u.unit)
                > l.capacity)
), started AS (
    UPDATE farm.builds b
    SET state = 'running', attempt = b.attempt + 1, worker = $2, started_at = clock_timestamp(),
        -- Null where a row was written to build_queue with its triggers disabled.
        queued_at = coalesce(b.queued_at, clock_timestamp()),
        finished_at = NULL, exit_code = NULL, term_signal = NULL, detail = NULL
    FROM builder WHERE b.id = $1
    RETURNING b.state, b.attempt, b.started_at, b.queued_at, b.properties, to_jsonb(b)::text AS row_json
), fitting AS MATERIALIZED (
    -- A daemon's memory is not to be filled by one row.
    SELECT s.*, octet_length(s.row_json) <= 8388608 AS fits FROM started s
), tried AS (
    INSERT INTO farm.build_attempts (build_id, attempt, builder, worker, folder, boot, started_at, slot, lock_units, lease)
    SELECT $1, s.attempt, r.name, $2, $6, $7, s.started_at, $3, $5, make_interval(secs => $8::float8)
    FROM fitting s CROSS JOIN builder r WHERE s.state = 'running'
    RETURNING build_id
)
SELECT s.attempt, (extract(epoch FROM s.started_at) * 1000000)::bigint AS started_us, CASE WHEN s.fits THEN s.row_json END AS row_json, r.name AS builder, r.executor, r.script, r.keep_workspace,
       -- Taken apart here: jsonb holds numbers and depths that other readers of JSON refuse.
       ARRAY(SELECT key FROM jsonb_each(s.properties) ORDER BY key) AS property_names,
       ARRAY(SELECT coalesce(value #>> '{}', '') FROM jsonb_each(s.properties) ORDER BY key) AS property_values,
       ARRAY(SELECT key FROM jsonb_each_text(r.env) ORDER BY key) AS env_names,
       ARRAY(SELECT value FROM jsonb_each_text(r.env) ORDER BY key) AS env_values,
       extract(epoch FROM r.timeout)::float8 AS timeout_seconds,
       extract(epoch FROM r.silence_timeout)::float8 AS silence_seconds, r.settings::text AS settings,
       (extract(epoch FROM coalesce((SELECT a.started_at FROM farm.build_attempts a WHERE a.build_id = $1 ORDER BY a.attempt LIMIT 1), s.started_at)) * 1000000)::bigint AS first_us,
       (SELECT coalesce(max(a.attempt), 0) + 1 FROM farm.build_attempts a
        WHERE a.build_id = $1 AND (a.state <> 'lost' OR a.started_at < s.queued_at)) AS adopt_from
FROM builder r LEFT JOIN fitting s ON true
-- A BEFORE trigger of a person's own can drop or undo a write without an error. Then the whole start is refused.
WHERE farm.build_all_written(CASE
    WHEN s.state IS DISTINCT FROM 'running' THEN 'builds'
    WHEN NOT EXISTS (SELECT FROM tried) THEN 'build_attempts'
END)

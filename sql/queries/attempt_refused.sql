-- Records a start that the database refused: an attempt that broke, charged like any other. Runs in the claim's transaction, which holds the
-- queue row, as its only write. No row comes back when the build does not wait any more.
-- $1 bigint  build    $2 text  worker    $3 text  why    $4 text  id of the worker's folder
-- Locks: the rows of builds and build_queue of this build, until the COMMIT that follows.
WITH tries AS MATERIALIZED (
    SELECT count(*) AS broken FROM farm.builds b JOIN farm.build_attempts a ON a.build_id = b.id AND a.started_at >= b.queued_at
    WHERE b.id = $1::bigint AND a.state IN ('error', 'lost')
), verdict AS MATERIALIZED (
    SELECT t.broken, b.attempt + 1 AS attempt, CASE WHEN t.broken + 1 < r.max_attempts THEN 'queued' ELSE 'error' END::farm.build_state AS state,
           least(power(2, t.broken), 300) AS delay_seconds, clock_timestamp() AS at,
           format('attempt %s of %s broke: %s', t.broken + 1, r.max_attempts, $3::text) AS detail
    FROM tries t, farm.builds b JOIN farm.builders r ON r.name = b.builder
    WHERE b.id = $1::bigint AND b.state IN ('described', 'queued')
), build AS (
    UPDATE farm.builds b
    SET state = v.state, attempt = v.attempt, worker = $2::text, started_at = v.at, queued_at = coalesce(b.queued_at, v.at),
        finished_at = CASE WHEN farm.build_state_is_final(v.state) THEN v.at END, exit_code = NULL, term_signal = NULL, detail = v.detail
    FROM verdict v WHERE b.id = $1::bigint
    RETURNING b.attempt, b.builder
), tried AS (
    INSERT INTO farm.build_attempts (build_id, attempt, builder, worker, folder, state, started_at, finished_at, detail)
    SELECT $1::bigint, b.attempt, b.builder, $2::text, $4::text, 'error', v.at, v.at, $3::text FROM build b CROSS JOIN verdict v
    RETURNING build_id
), again AS (
    UPDATE farm.build_queue q SET run_after = clock_timestamp() + make_interval(secs => v.delay_seconds)
    FROM verdict v WHERE q.build_id = $1::bigint AND NOT farm.build_state_is_final(v.state)
    RETURNING q.build_id
), done AS (
    DELETE FROM farm.build_queue q USING verdict v WHERE q.build_id = $1::bigint AND farm.build_state_is_final(v.state)
    RETURNING q.build_id
)
SELECT b.attempt, v.state::text AS state, v.delay_seconds::float8 AS delay_seconds,
       farm.build_state_is_final(v.state) AND EXISTS (SELECT FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[$1::bigint]) AS needed
FROM verdict v LEFT JOIN build b ON true
-- A BEFORE trigger of a person's own can drop or undo a write without an error. Then the whole record is refused.
WHERE farm.build_all_written(CASE
    WHEN b.attempt IS DISTINCT FROM v.attempt THEN 'builds'
    WHEN NOT EXISTS (SELECT FROM tried) THEN 'build_attempts'
    WHEN NOT EXISTS (SELECT FROM again UNION ALL SELECT FROM done) THEN 'build_queue'
END)

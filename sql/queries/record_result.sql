-- Records the end of an attempt: verdict, attempt and dequeue (or the next try) together. Runs in the claim's transaction,
-- as its only write. No row comes back when the attempt is not the build's running one any more.
-- $1 build  $2 attempt  $3 attempt_state  $4 exit code  $5 signal  $6 detail  $7 user seconds  $8 system seconds
-- $9 max rss, bytes  $10 log, bytes  $11 charged: whether the attempt counts (false: it was given back)
-- $12 started  $13 finished, microseconds since 1970, of a build that another system ran; null: as seen from here
-- $14 hopeless: an attempt in error that would end the same way if it was tried again
-- Locks: the rows of builds, build_attempts and build_queue of this build, until the COMMIT that follows.
WITH ended AS MATERIALIZED (
    SELECT $1::bigint AS build_id, $2::integer AS attempt, $3::text AS state, $4::integer AS exit_code, $5::integer AS term_signal,
           $6::text AS detail, $7::float8 AS user_seconds, $8::float8 AS system_seconds, $9::bigint AS max_rss_bytes,
           $10::bigint AS log_bytes, $11::boolean AS charged,
           'epoch'::timestamptz + $12::bigint * interval '1 microsecond' AS started_at,
           'epoch'::timestamptz + $13::bigint * interval '1 microsecond' AS finished_at
), tries AS MATERIALIZED (
    SELECT count(*) FILTER (WHERE a.state IN ('error', 'lost')) AS broken,
           count(*) FILTER (WHERE a.state IN ('failed', 'timed_out')) AS failed
    FROM farm.builds b JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt <> $2::integer AND a.started_at >= b.queued_at
    WHERE b.id = $1::bigint
), held AS MATERIALIZED (
    -- Before anything is written: should somebody hold this row, the wait is one of a claim that everybody sees.
    SELECT b.* FROM farm.builds b WHERE b.id = $1::bigint AND b.state = 'running' AND b.attempt = $2::integer FOR NO KEY UPDATE
), verdict AS MATERIALIZED (
    SELECT CASE
               -- Whatever would be tried again ends here when somebody has cancelled it meanwhile.
               WHEN b.cancel_requested_at IS NOT NULL AND e.state NOT IN ('passed', 'failed', 'timed_out') THEN 'cancelled'
               WHEN NOT e.charged THEN 'queued'
               WHEN e.state IN ('error', 'lost') THEN CASE WHEN NOT $14::boolean AND t.broken + 1 < r.max_attempts THEN 'queued' ELSE 'error' END
               WHEN e.state IN ('failed', 'timed_out') AND t.failed < r.retry_failed AND b.cancel_requested_at IS NULL THEN 'queued'
               ELSE e.state
           END::farm.build_state AS state,
           -- What we broke is tried again after 1, 2, 4, ... seconds, at most 5 minutes; a flaky build at once.
           CASE WHEN e.charged AND e.state IN ('error', 'lost') THEN least(power(2, t.broken), 300) ELSE 0 END AS delay_seconds,
           CASE
               WHEN b.cancel_requested_at IS NOT NULL AND (NOT e.charged OR e.state NOT IN ('passed', 'failed', 'timed_out', 'cancelled'))
                   THEN left(concat_ws(': ', 'cancelled', nullif(b.cancel_reason, '')), 10000)
               WHEN NOT e.charged OR e.state = 'cancelled' OR $14::boolean THEN e.detail
               WHEN e.state = 'lost' THEN concat_ws(': ', format('attempt %s of %s lost', t.broken + 1, r.max_attempts), e.detail)
               WHEN e.state = 'error' THEN concat_ws(': ', format('attempt %s of %s broke', t.broken + 1, r.max_attempts), e.detail)
               WHEN e.state IN ('failed', 'timed_out') AND r.retry_failed > 0
                   THEN concat_ws(': ', format('try %s of %s', t.failed + 1, r.retry_failed + 1), e.detail)
               WHEN t.broken + t.failed > 0 THEN concat_ws(': ', format('passed in try %s', t.broken + t.failed + 1), e.detail)
               ELSE e.detail
           END AS detail
    FROM ended e, tries t, held b JOIN farm.builders r ON r.name = b.builder
), attempt AS (
    UPDATE farm.build_attempts a
    SET state = e.state::farm.attempt_state, finished_at = clock_timestamp(), exit_code = e.exit_code, term_signal = e.term_signal,
        detail = e.detail, user_seconds = e.user_seconds, system_seconds = e.system_seconds, max_rss_bytes = e.max_rss_bytes,
        log_bytes = e.log_bytes
    FROM ended e, verdict v WHERE a.build_id = $1::bigint AND a.attempt = $2::integer
    RETURNING a.finished_at, a.state
), build AS (
    UPDATE farm.builds b
    SET state = v.state, detail = v.detail, exit_code = e.exit_code, term_signal = e.term_signal,
        -- Another system's clock may be wrong, and has whole seconds: not before the attempt, nor after its result. The attempt keeps its
        -- own start, which tells it from others.
        started_at = CASE WHEN e.started_at IS NULL THEN b.started_at ELSE least(greatest(e.started_at, b.started_at), a.finished_at) END,
        finished_at = CASE WHEN NOT farm.build_state_is_final(v.state) THEN NULL
                           WHEN e.finished_at IS NULL THEN a.finished_at
                           ELSE least(greatest(e.finished_at, e.started_at, b.started_at), a.finished_at) END
    FROM ended e, verdict v, attempt a WHERE b.id = $1::bigint
    RETURNING b.state
), again AS (
    UPDATE farm.build_queue q
    SET run_after = CASE WHEN v.delay_seconds > 0 THEN clock_timestamp() + make_interval(secs => v.delay_seconds) ELSE q.run_after END
    -- By the parameter: joined, all of a queue that is thought to be small would be read, dead rows behind a long claim included.
    FROM verdict v WHERE q.build_id = $1::bigint AND NOT farm.build_state_is_final(v.state)
    RETURNING q.build_id
), done AS (
    DELETE FROM farm.build_queue q USING verdict v WHERE q.build_id = $1::bigint AND farm.build_state_is_final(v.state)
    RETURNING q.build_id
)
SELECT v.state::text AS state, v.delay_seconds::float8 AS delay_seconds,
       -- Whether other builds hang on it: for whoever settles them after the COMMIT.
       farm.build_state_is_final(v.state) AND EXISTS (SELECT FROM farm.build_queue w WHERE w.needs <> '{}' AND w.needs @> ARRAY[$1::bigint]) AS needed
FROM verdict v
-- A BEFORE trigger of a person's own can drop or undo a write without an error. Then the whole result is refused. The trigger may write
-- another final state.
WHERE farm.build_all_written(CASE
    WHEN NOT EXISTS (SELECT FROM attempt a WHERE a.state <> 'running') THEN 'build_attempts'
    WHEN NOT EXISTS (SELECT FROM build b WHERE b.state <> 'running' AND farm.build_state_is_final(b.state) = farm.build_state_is_final(v.state)) THEN 'builds'
    WHEN NOT EXISTS (SELECT FROM again UNION ALL SELECT FROM done) THEN 'build_queue'
END)

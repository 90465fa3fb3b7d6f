-- Views that answer the questions people ask. They only gain columns, at the end: other people's views stand on them.

CREATE OR REPLACE FUNCTION farm.build_log_text(id bigint, attempt integer DEFAULT NULL) RETURNS text
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(string_agg(l.content, '' ORDER BY l.seq), '')
    FROM farm.build_log l
    WHERE l.build_id = $1
      AND l.attempt = coalesce($2, (SELECT b.attempt FROM farm.builds b WHERE b.id = $1))
$$;
COMMENT ON FUNCTION farm.build_log_text(bigint, integer) IS 'The log of a build as one text; of its last attempt unless another is named.';

-- A held claim as the lock table shows it: the row lock itself (build_queue.xmax is the transaction that holds it).
-- Crash-safe and never stale: there is no flag that could lie.
CREATE OR REPLACE VIEW farm.running_builds AS
WITH holders AS MATERIALIZED (
    SELECT transactionid, pid FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted
)
SELECT b.id AS build_id,
       b.builder,
       b.worker,
       b.attempt,
       b.started_at,
       date_trunc('milliseconds', clock_timestamp() - b.started_at) AS elapsed,
       usual.usual_time,
       CASE WHEN usual.usual_time > '0' THEN
           least(99, floor(100 * extract(epoch FROM clock_timestamp() - b.started_at) / extract(epoch FROM usual.usual_time)))::integer
       END AS percent,
       last_line.last_log_line,
       h.pid IS NOT NULL AS claim_held,
       h.pid AS claim_pid,
       a.external_worker,
       a.external_url,
       (SELECT s.name FROM farm.build_steps s WHERE s.build_id = b.id AND s.attempt = b.attempt AND s.state = 'running' ORDER BY s.position DESC LIMIT 1) AS step,
       -- While its result is recorded the claim's session may have to wait for a person's transaction; a result that the database refuses
       -- is told by its worker.
       coalesce((SELECT 'its result waits for an open transaction of ' || string_agg(farm.build_session(blocker), ' and ') FROM unnest(pg_blocking_pids(h.pid)) AS blocker), b.detail) AS detail
FROM farm.builds b
LEFT JOIN farm.build_queue q ON q.build_id = b.id
LEFT JOIN holders h ON h.transactionid = q.xmax
LEFT JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
LEFT JOIN LATERAL (
    SELECT date_trunc('milliseconds', percentile_cont(0.5) WITHIN GROUP (ORDER BY f.finished_at - f.started_at)) AS usual_time
    FROM (SELECT p.started_at, p.finished_at FROM farm.builds p
          WHERE p.builder = b.builder AND p.finished_at IS NOT NULL AND p.state = 'passed' AND p.started_at IS NOT NULL
          ORDER BY p.finished_at DESC LIMIT 30) f
) usual ON true
LEFT JOIN LATERAL (
    -- The last line that has text; of a progress bar what stands after its last carriage return. A line that is written bit by bit lies
    -- in several pieces.
    SELECT (regexp_match(rtrim(right(string_agg(right(newest.content, 2000), '' ORDER BY newest.seq), 2000), E'\r\n\t '), E'[^\\r\\n]*$'))[1] AS last_log_line
    FROM (SELECT l.seq, l.content FROM farm.build_log l
          WHERE l.build_id = b.id AND l.attempt = b.attempt
            -- From the newest piece with text on, and some before it.
            AND l.seq > (SELECT t.seq FROM farm.build_log t
                         WHERE t.build_id = b.id AND t.attempt = b.attempt AND t.content ~ '[^[:space:]]'
                         ORDER BY t.seq DESC LIMIT 1) - 8
          ORDER BY l.seq LIMIT 16) newest
) last_line ON true
WHERE b.state = 'running';
COMMENT ON VIEW farm.running_builds IS 'What runs now.';
COMMENT ON COLUMN farm.running_builds.build_id IS 'The build.';
COMMENT ON COLUMN farm.running_builds.builder IS 'Its builder.';
COMMENT ON COLUMN farm.running_builds.worker IS 'The worker that runs it.';
COMMENT ON COLUMN farm.running_builds.attempt IS 'Which try this is.';
COMMENT ON COLUMN farm.running_builds.started_at IS 'When the attempt started.';
COMMENT ON COLUMN farm.running_builds.elapsed IS 'How long it has been running.';
COMMENT ON COLUMN farm.running_builds.usual_time IS 'Median of the last 30 passed builds of the builder.';
COMMENT ON COLUMN farm.running_builds.percent IS 'Elapsed against usual time, at most 99.';
COMMENT ON COLUMN farm.running_builds.last_log_line IS 'The last line of its log.';
COMMENT ON COLUMN farm.running_builds.claim_held IS 'Whether a transaction holds its queue row now; read from the lock table.';
COMMENT ON COLUMN farm.running_builds.claim_pid IS 'Backend that holds it (pg_stat_activity.pid).';
COMMENT ON COLUMN farm.running_builds.external_worker IS 'buildbot: the Buildbot worker that builds it.';
COMMENT ON COLUMN farm.running_builds.external_url IS 'buildbot: its page on the master.';
COMMENT ON COLUMN farm.running_builds.step IS 'The step that runs, where its executor tells of steps.';
COMMENT ON COLUMN farm.running_builds.detail IS 'Why its result cannot be recorded yet: an open transaction that holds its row, or what the database refuses.';

CREATE OR REPLACE VIEW farm.builder_status AS
WITH slots AS MATERIALIZED (
    SELECT number, count(*)::integer AS used FROM farm.build_advisory_locks WHERE kind = 'slot' AND ours GROUP BY number
)
SELECT r.name AS builder,
       CASE WHEN r.paused THEN 'paused' WHEN coalesce(s.used, 0) > 0 THEN 'busy' ELSE 'idle' END AS status,
       coalesce(s.used, 0) AS slots_used,
       r.max_running,
       (SELECT count(*) FROM farm.build_queue q JOIN farm.builds b ON b.id = q.build_id WHERE q.builder = r.name AND b.state <> 'running') AS waiting,
       l.id AS last_build_id,
       l.state AS last_state,
       l.finished_at AS last_finished_at,
       r.paused_reason
FROM farm.builders r
LEFT JOIN slots s ON s.number = r.number
LEFT JOIN LATERAL (
    SELECT b.id, b.state, b.finished_at FROM farm.builds b
    WHERE b.builder = r.name AND b.finished_at IS NOT NULL ORDER BY b.finished_at DESC LIMIT 1
) l ON true
ORDER BY r.name;
COMMENT ON VIEW farm.builder_status IS 'Every builder: idle, busy or paused, and how its last build went.';
COMMENT ON COLUMN farm.builder_status.builder IS 'The builder.';
COMMENT ON COLUMN farm.builder_status.status IS 'idle, busy (at least one slot used) or paused.';
COMMENT ON COLUMN farm.builder_status.slots_used IS 'How many of its builds run now, over all workers; read from the lock table.';
COMMENT ON COLUMN farm.builder_status.max_running IS 'How many may run at once.';
COMMENT ON COLUMN farm.builder_status.waiting IS 'How many wait.';
COMMENT ON COLUMN farm.builder_status.last_build_id IS 'The build that finished last.';
COMMENT ON COLUMN farm.builder_status.last_state IS 'Its state.';
COMMENT ON COLUMN farm.builder_status.last_finished_at IS 'When it finished.';
COMMENT ON COLUMN farm.builder_status.paused_reason IS 'Why it is paused.';

CREATE OR REPLACE VIEW farm.worker_status AS
WITH alive AS MATERIALIZED (
    -- A living daemon holds an advisory lock on its name.
    SELECT part AS hash, ours, holder FROM farm.build_advisory_locks WHERE kind = 'name'
)
SELECT w.name AS worker,
       CASE WHEN a.ours THEN w.state WHEN w.state = 'stopped' THEN 'stopped' ELSE 'gone' END AS status,
       (SELECT count(*) FROM farm.builds b WHERE b.state = 'running' AND b.worker = w.name) AS running,
       w.slots,
       w.labels,
       w.builders,
       w.host,
       w.pid,
       w.version,
       w.started_at,
       date_trunc('seconds', clock_timestamp() - w.seen_at) AS seen_ago,
       CASE WHEN a.ours IS FALSE THEN 'its name is taken by ' || a.holder || ', which is no worker' ELSE w.detail END AS detail,
       w.accepting,
       w.unready,
       w.lease,
       w.grace,
       w.kept
FROM farm.workers w
LEFT JOIN LATERAL (SELECT n.ours, n.holder FROM alive n WHERE n.hash = hashtext(w.name) ORDER BY n.ours DESC LIMIT 1) a ON true
ORDER BY w.name;
COMMENT ON VIEW farm.worker_status IS 'Every worker: active, draining, stopped, or gone (it vanished without a goodbye).';
COMMENT ON COLUMN farm.worker_status.worker IS 'The worker.';
COMMENT ON COLUMN farm.worker_status.status IS 'active, draining, stopped or gone; alive or not is read from the lock table.';
COMMENT ON COLUMN farm.worker_status.running IS 'How many builds it runs.';
COMMENT ON COLUMN farm.worker_status.slots IS 'How many it runs at once.';
COMMENT ON COLUMN farm.worker_status.labels IS 'Labels it offers.';
COMMENT ON COLUMN farm.worker_status.builders IS 'Patterns of builder names that it takes.';
COMMENT ON COLUMN farm.worker_status.host IS 'Machine it runs on.';
COMMENT ON COLUMN farm.worker_status.pid IS 'Process id of its daemon.';
COMMENT ON COLUMN farm.worker_status.version IS 'Version of its daemon.';
COMMENT ON COLUMN farm.worker_status.started_at IS 'When its daemon started.';
COMMENT ON COLUMN farm.worker_status.seen_ago IS 'How long ago it last looked at the queue.';
COMMENT ON COLUMN farm.worker_status.detail IS 'One line for a person.';
COMMENT ON COLUMN farm.worker_status.accepting IS 'False while it claims nothing for a reason of its own: see detail.';
COMMENT ON COLUMN farm.worker_status.kept IS 'What its [retention] would delete and could not, in its last round, and why; null: nothing.';
COMMENT ON COLUMN farm.worker_status.unready IS 'Builders whose builds it could not start when it last tried, each with the reason.';
COMMENT ON COLUMN farm.worker_status.lease IS 'How long its builds live without a claim. Null: its program is older than the tables, and starts nothing.';
COMMENT ON COLUMN farm.worker_status.grace IS 'How long it leaves a running build that nobody holds alone, or longer by as much as that build''s lease is longer than its own.';

CREATE OR REPLACE VIEW farm.queue_status AS
WITH waiting AS (
    SELECT q.build_id, q.builder, q.priority, q.run_after, q.ready, q.needs, b.queued_at, b.attempt, b.detail, q.xmax AS holder,
           CASE WHEN b.cancel_requested_at IS NOT NULL OR EXISTS (SELECT FROM farm.build_cancels c WHERE c.build_id = b.id) THEN clock_timestamp() END AS cancel_requested_at,
           row_number() OVER (PARTITION BY q.builder ORDER BY q.ready DESC, q.priority DESC, q.build_id) AS position
    FROM farm.build_queue q JOIN farm.builds b ON b.id = q.build_id
    WHERE b.state <> 'running'
), usual AS MATERIALIZED (
    SELECT r.name, u.usual_time
    FROM farm.builders r
    CROSS JOIN LATERAL (
        SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY f.finished_at - f.started_at) AS usual_time
        FROM (SELECT p.started_at, p.finished_at FROM farm.builds p
              WHERE p.builder = r.name AND p.finished_at IS NOT NULL AND p.state = 'passed' AND p.started_at IS NOT NULL
              ORDER BY p.finished_at DESC LIMIT 30) f
    ) u
), live AS MATERIALIZED (
    SELECT worker, status, accepting AND lease IS NOT NULL AS accepting,
           CASE WHEN lease IS NULL THEN 'of a program older than the tables: install the one that migrated them, and restart it' ELSE detail END AS detail,
           unready, labels, builders, running < slots AS idle FROM farm.worker_status WHERE status IN ('active', 'draining')
), offers AS MATERIALIZED (
    -- In one pass: a view that looks costly is compiled by PostgreSQL (jit), and that takes longer than running it.
    SELECT r.name, count(w.worker) > 0 AS fitting, coalesce(bool_or(w.accepting AND NOT w.unready ? r.name), false) AS accepting,
           coalesce(bool_or(w.accepting AND NOT w.unready ? r.name AND w.idle), false) AS idle,
           coalesce(min(w.unready ->> r.name) FILTER (WHERE w.accepting),
                    min('worker ' || w.worker || ' is ' || w.detail) FILTER (WHERE NOT w.accepting)) AS refusal
    FROM farm.builders r
    LEFT JOIN live w ON w.status = 'active' AND r.labels <@ w.labels AND r.name ~ (
        SELECT '^(' || string_agg(replace(replace(replace(p, '.', '[.]'), '*', '.*'), '?', '.'), '|') || ')$' FROM unnest(w.builders) AS p)
    GROUP BY r.name
), held AS MATERIALIZED (
    -- Open transactions but claims: a claim that has begun nothing yet is about to.
    SELECT l.transactionid, farm.build_session(l.pid) AS holder FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND a.application_name NOT LIKE 'buildreactor %'
), taken AS MATERIALIZED (
    SELECT kind, number, part, pid, ours, holder FROM farm.build_advisory_locks WHERE kind IN ('slot', 'unit')
), lock_use AS MATERIALIZED (
    SELECT l.name, l.capacity, count(u.pid) FILTER (WHERE u.ours) AS used, count(u.pid) FILTER (WHERE NOT u.ours) AS taken,
           string_agg(DISTINCT u.holder, ', ') FILTER (WHERE NOT u.ours) AS takers
    FROM farm.build_locks l
    LEFT JOIN taken u ON u.kind = 'unit' AND u.number = l.number AND (u.ours OR u.part <= l.capacity)
    GROUP BY l.name, l.capacity
), slots AS MATERIALIZED (
    -- taken: by sessions that are none of ours, and have no right to them.
    SELECT t.number, count(*) FILTER (WHERE t.ours)::integer AS used, count(*) FILTER (WHERE NOT t.ours)::integer AS taken,
           string_agg(DISTINCT t.holder, ', ') FILTER (WHERE NOT t.ours) AS takers
    FROM taken t JOIN farm.builders r ON r.number = t.number AND (t.ours OR t.part <= r.max_running)
    WHERE t.kind = 'slot' GROUP BY t.number
)
SELECT w.build_id,
       w.builder,
       w.priority,
       w.position,
       date_trunc('milliseconds', clock_timestamp() - w.queued_at) AS waiting,
       w.run_after,
       CASE WHEN NOT r.paused AND o.accepting AND w.needs = '{}' AND w.cancel_requested_at IS NULL THEN
           greatest(w.run_after, clock_timestamp()
               -- Behind others it is not known before a build of the builder has passed.
               + CASE WHEN w.position + coalesce(s.used, 0) <= r.max_running THEN '0'
                      ELSE u.usual_time * ((w.position - 1 + coalesce(s.used, 0)) / r.max_running)::integer END)
       END AS expected_start,
       CASE WHEN r.paused THEN 'builder ' || w.builder || ' is paused' || coalesce(': ' || r.paused_reason, '')
            WHEN w.cancel_requested_at IS NOT NULL THEN 'it is being cancelled: a worker removes it when it next looks'
            WHEN w.needs <> '{}' THEN 'needs ' || (
                SELECT string_agg(format('#%s (%s)', n.id, CASE n.state WHEN 'described' THEN 'described, not queued' ELSE n.state::text END), ', ' ORDER BY n.id)
                FROM farm.builds n WHERE n.id = ANY (w.needs)) || CASE WHEN w.detail LIKE 'the database refuses to end or release it: %' THEN '; ' || w.detail ELSE '' END
            WHEN EXISTS (SELECT FROM held h WHERE h.transactionid = w.holder) THEN 'its row in build_queue is held by an open transaction of '
                || (SELECT min(h.holder) FROM held h WHERE h.transactionid = w.holder)
            WHEN NOT w.ready AND w.attempt > 0 AND w.detail IS NOT NULL
                THEN w.detail || '; next try at ' || to_char(w.run_after, 'HH24:MI:SS TZ')
            WHEN NOT w.ready THEN 'scheduled for ' || to_char(w.run_after, 'YYYY-MM-DD HH24:MI:SS TZ')
            WHEN NOT EXISTS (SELECT FROM live) THEN 'no worker is running: ' || coalesce(
                (SELECT 'the name of worker ' || l.worker || ' is taken by ' || l.holder || ', which is no worker'
                 FROM (SELECT w.name AS worker, n.holder FROM farm.workers w JOIN farm.build_advisory_locks n ON n.kind = 'name' AND n.part = hashtext(w.name) AND NOT n.ours
                       ORDER BY w.name LIMIT 1) l),
                'start one with buildreactor run')
            WHEN NOT EXISTS (SELECT FROM live l WHERE l.status = 'active') THEN 'the only workers are draining: start one with buildreactor run'
            WHEN NOT o.fitting THEN 'no running worker takes builder ' || w.builder
                || CASE WHEN r.labels = '{}' THEN '' ELSE ' with labels ' || array_to_string(r.labels, ', ') END || ' ([worker] builders, labels)'
            WHEN NOT o.accepting THEN o.refusal
            WHEN EXISTS (SELECT FROM live l WHERE l.unready ? ('#' || w.build_id)) THEN (
                SELECT min(l.unready ->> ('#' || w.build_id)) FROM live l WHERE l.unready ? ('#' || w.build_id))
            WHEN s.used >= r.max_running THEN 'builder ' || w.builder || ' is busy (' || s.used || ' of ' || r.max_running || ')'
            WHEN s.used + s.taken >= r.max_running THEN 'builder ' || w.builder || ' is busy (' || s.used || ' of ' || r.max_running || '); '
                || s.taken || ' of its slots taken by ' || s.takers || ', which is no worker'
            WHEN EXISTS (SELECT FROM lock_use u WHERE u.name = ANY (r.locks) AND u.used + u.taken >= u.capacity) THEN 'waits for lock ' || (
                SELECT string_agg(format('%s (%s of %s in use%s)', u.name, u.used, u.capacity, '; ' || u.taken || ' taken by ' || u.takers || ', which is no worker'), ', ' ORDER BY u.name)
                FROM lock_use u WHERE u.name = ANY (r.locks) AND u.used + u.taken >= u.capacity)
            WHEN NOT o.idle THEN 'all fitting workers are busy'
            WHEN w.position > 1 THEN 'about to start, after ' || w.position - 1 || CASE w.position WHEN 2 THEN ' other' ELSE ' others' END
            ELSE 'about to start'
       END AS waiting_because
FROM waiting w
JOIN farm.builders r ON r.name = w.builder
LEFT JOIN slots s ON s.number = r.number
JOIN offers o ON o.name = w.builder
JOIN usual u ON u.name = w.builder
ORDER BY w.ready DESC, w.priority DESC, w.build_id;
COMMENT ON VIEW farm.queue_status IS 'What waits, in which place, how long, and why.';
COMMENT ON COLUMN farm.queue_status.build_id IS 'The build.';
COMMENT ON COLUMN farm.queue_status.builder IS 'Its builder.';
COMMENT ON COLUMN farm.queue_status.priority IS 'Higher first.';
COMMENT ON COLUMN farm.queue_status.position IS 'Place in the queue of its builder, from 1.';
COMMENT ON COLUMN farm.queue_status.waiting IS 'How long it has waited.';
COMMENT ON COLUMN farm.queue_status.run_after IS 'Not before this time.';
COMMENT ON COLUMN farm.queue_status.expected_start IS 'When it will start if builds take their usual time; null when nobody would start it, or when nobody knows yet how long those before it take.';
COMMENT ON COLUMN farm.queue_status.waiting_because IS 'Why it waits.';

CREATE OR REPLACE VIEW farm.recent_builds AS
SELECT b.id AS build_id,
       b.builder,
       b.state,
       b.attempt,
       b.worker,
       date_trunc('milliseconds', b.started_at - b.queued_at) AS waited,
       date_trunc('milliseconds', b.finished_at - b.started_at) AS ran,
       b.finished_at,
       b.exit_code,
       b.detail,
       b.reason,
       b.submitted_by
FROM farm.builds b
WHERE b.finished_at IS NOT NULL
ORDER BY b.finished_at DESC, b.id DESC
LIMIT 100;
COMMENT ON VIEW farm.recent_builds IS 'The last 100 builds that finished, newest first.';
COMMENT ON COLUMN farm.recent_builds.build_id IS 'The build.';
COMMENT ON COLUMN farm.recent_builds.builder IS 'Its builder.';
COMMENT ON COLUMN farm.recent_builds.state IS 'How it ended.';
COMMENT ON COLUMN farm.recent_builds.attempt IS 'How many attempts it took.';
COMMENT ON COLUMN farm.recent_builds.worker IS 'The worker of the last attempt.';
COMMENT ON COLUMN farm.recent_builds.waited IS 'From queued to the start of the last attempt.';
COMMENT ON COLUMN farm.recent_builds.ran IS 'How long the last attempt took.';
COMMENT ON COLUMN farm.recent_builds.finished_at IS 'When it finished.';
COMMENT ON COLUMN farm.recent_builds.exit_code IS 'Exit code of the script.';
COMMENT ON COLUMN farm.recent_builds.detail IS 'Why it is in this state.';
COMMENT ON COLUMN farm.recent_builds.reason IS 'Why it was asked for.';
COMMENT ON COLUMN farm.recent_builds.submitted_by IS 'Who asked for it.';

CREATE OR REPLACE VIEW farm.build_stats AS
SELECT b.builder,
       count(*) AS runs,
       count(*) FILTER (WHERE b.state = 'passed') AS passed,
       round(100.0 * count(*) FILTER (WHERE b.state = 'passed') / count(*), 1) AS pass_rate,
       date_trunc('milliseconds', percentile_cont(0.5) WITHIN GROUP (ORDER BY b.finished_at - b.started_at)) AS median_time,
       date_trunc('milliseconds', percentile_cont(0.95) WITHIN GROUP (ORDER BY b.finished_at - b.started_at)) AS p95_time,
       date_trunc('milliseconds', percentile_cont(0.5) WITHIN GROUP (ORDER BY b.started_at - b.queued_at)) AS median_waiting,
       date_trunc('milliseconds', percentile_cont(0.95) WITHIN GROUP (ORDER BY b.started_at - b.queued_at)) AS p95_waiting
FROM farm.builds b
WHERE b.state IN ('passed', 'failed', 'timed_out')
GROUP BY b.builder
ORDER BY b.builder;
COMMENT ON VIEW farm.build_stats IS 'Per builder: runs, pass rate, and how long builds take and wait. Counts builds that ended passed, failed or timed_out.';
COMMENT ON COLUMN farm.build_stats.builder IS 'The builder.';
COMMENT ON COLUMN farm.build_stats.runs IS 'Builds that ended with a verdict.';
COMMENT ON COLUMN farm.build_stats.passed IS 'How many of them passed.';
COMMENT ON COLUMN farm.build_stats.pass_rate IS 'Passed in percent.';
COMMENT ON COLUMN farm.build_stats.median_time IS 'Median build time.';
COMMENT ON COLUMN farm.build_stats.p95_time IS '95th percentile of build time.';
COMMENT ON COLUMN farm.build_stats.median_waiting IS 'Median time in the queue.';
COMMENT ON COLUMN farm.build_stats.p95_waiting IS '95th percentile of time in the queue.';

-- What runs on a worker.
-- $1 text  worker    $2 text  id of its folder
SELECT b.id AS build_id, b.attempt, b.builder, r.executor, r.keep_workspace, coalesce(a.slot, 0) AS slot,
       (extract(epoch FROM a.started_at) * 1000000)::bigint AS started_us,
       extract(epoch FROM r.timeout)::float8 AS timeout_seconds, extract(epoch FROM r.silence_timeout)::float8 AS silence_seconds,
       r.settings::text AS settings,
       -- As in begin_attempt.sql.
       (SELECT (extract(epoch FROM x.started_at) * 1000000)::bigint FROM farm.build_attempts x WHERE x.build_id = b.id ORDER BY x.attempt LIMIT 1) AS first_us,
       (SELECT coalesce(max(x.attempt), 0) + 1 FROM farm.build_attempts x
        WHERE x.build_id = b.id AND x.attempt < b.attempt AND (x.state <> 'lost' OR x.started_at < b.queued_at)) AS adopt_from,
       greatest(extract(epoch FROM clock_timestamp() - a.started_at), 0)::float8 AS age_seconds, a.boot
FROM farm.builds b JOIN farm.builders r ON r.name = b.builder JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
WHERE b.state = 'running' AND b.worker = $1 AND a.folder = $2
ORDER BY b.id

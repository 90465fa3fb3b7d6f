-- Where another system shows the last attempt of a build, and its steps in order; no row: there was none. A row without a step: none yet.
-- $1 bigint  build
-- seconds: how long the step took, or has taken; its start is by another clock, so it may be nothing.
SELECT a.attempt, a.external_url, a.external_worker, s.position, s.name, s.state, s.detail,
       extract(epoch FROM coalesce(s.finished_at, clock_timestamp()) - s.started_at)::float8 AS seconds
FROM farm.builds b
JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
LEFT JOIN farm.build_steps s ON s.build_id = a.build_id AND s.attempt = a.attempt
WHERE b.id = $1 AND a.external_url IS NOT NULL
ORDER BY s.position

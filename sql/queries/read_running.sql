-- What runs, the longest first; the number of all that run comes with each row.
-- $1 bigint  only this build; null: all    $2 bigint  at most this many rows
-- usual_seconds: median of the builder; null where nothing has passed yet. last_log_line: without terminal escapes (colours).
SELECT build_id, builder, worker, attempt, extract(epoch FROM elapsed)::float8 AS elapsed_seconds,
       extract(epoch FROM usual_time)::float8 AS usual_seconds,
       regexp_replace(last_log_line, E'\\x1b(\\[[0-9;:?]*[ -/]*[@-~]|\\][^\\x07\\x1b]*(\\x07|\\x1b\\\\)|[@-Z\\\\-_])', '', 'g') AS last_log_line,
       count(*) OVER () AS total
FROM farm.running_builds
WHERE $1::bigint IS NULL OR build_id = $1
ORDER BY started_at, build_id
LIMIT $2

-- State of an attempt and whether it is its build's last one, to see after a doubt what was recorded.
-- $1 bigint  build    $2 integer  attempt    $3 bigint  its start, microseconds since 1970
SELECT a.state::text AS state, b.attempt = a.attempt AND b.state = 'running' AS current
FROM farm.build_attempts a JOIN farm.builds b ON b.id = a.build_id
WHERE a.build_id = $1 AND a.attempt = $2 AND (extract(epoch FROM a.started_at) * 1000000)::bigint = $3

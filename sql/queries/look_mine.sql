-- What a worker was running when its last daemon left.
-- $1 text  worker    $2 text  id of its folder
SELECT b.id AS build_id, b.attempt, b.builder, r.executor, r.keep_workspace, coalesce(a.slot, 0) AS slot,
       (extract(epoch FROM a.started_at) * 1000000)::bigint AS started_us
FROM builds b JOIN builders r ON r.name = b.builder JOIN build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
WHERE b.state = 'running' AND b.worker = $1 AND a.folder = $2
ORDER BY b.id

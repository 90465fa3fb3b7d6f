-- Running attempts of a worker that somebody wants to end.
-- $1 text  worker
SELECT id AS build_id, attempt, coalesce(cancel_reason, '') AS reason FROM farm.builds
WHERE worker = $1 AND state = 'running' AND cancel_requested_at IS NOT NULL

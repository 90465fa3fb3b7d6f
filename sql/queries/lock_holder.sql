-- Who has an advisory lock that could not be had.
-- $1 text  its kind, as in build_advisory_locks    $2 text  what its key is the hash of; null: of nothing
SELECT holder, pid, ours FROM farm.build_advisory_locks
WHERE kind = $1 AND ($2::text IS NULL OR part = hashtext($2)) ORDER BY ours DESC LIMIT 1

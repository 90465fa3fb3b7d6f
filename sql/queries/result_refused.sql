-- Says in builds why the result of an attempt cannot be recorded. Nothing once it has ended.
-- $1 bigint  build    $2 integer  attempt    $3 text  why
-- Locks: the builds row, for the length of this statement; waits for nobody.
UPDATE farm.builds b SET detail = $3
WHERE b.id IN (SELECT h.id FROM farm.builds h WHERE h.id = $1 AND h.attempt = $2 AND h.state = 'running' FOR NO KEY UPDATE SKIP LOCKED)

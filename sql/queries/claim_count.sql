-- Counts a claim that was taken again, if the attempt is still its build's running one: others who saw its row unlocked start to
-- count `grace` anew. Runs while the queue row is locked, before the lease is renewed.
-- $1 bigint  build    $2 integer  attempt
-- Locks: the row of build_attempts. Its own state is asked too: that is what is looked at again after a wait for that lock.
UPDATE build_attempts a SET claims = a.claims + 1
FROM builds b
WHERE a.build_id = $1 AND a.attempt = $2 AND a.state = 'running' AND b.id = a.build_id AND b.attempt = a.attempt AND b.state = 'running'
RETURNING a.claims

-- Counts a claim that was taken again, if the attempt is still its build's running one: others who saw its row unlocked start to
-- count `grace` anew. Runs on another connection while the queue row is locked, before the lease is renewed. Comes back with what the
-- keys of the claim's advisory locks are made of: the builder's number and slot, and numbers and units of build_locks.
-- The lease in the row is the longest that the attempt's processes were ever given. It never shrinks: a daemon that was restarted with a
-- shorter one adopts processes whose keeper was promised the longer. $5 stands for what a program that wrote none may have given them.
-- $1 bigint  build    $2 integer  attempt    $3 bigint  its start, microseconds since 1970
-- $4 float8  the lease that they are given from now on    $5 float8  see above; both seconds
-- Locks: the row of build_attempts. Its own state is asked too: that is what is looked at again after a wait for that lock.
WITH counted AS (
    UPDATE farm.build_attempts a
    SET claims = a.claims + 1, lease = greatest(coalesce(a.lease, make_interval(secs => $5::float8)), make_interval(secs => $4::float8))
    FROM farm.builds b JOIN farm.builders r ON r.name = b.builder
    WHERE a.build_id = $1 AND a.attempt = $2 AND a.state = 'running' AND (extract(epoch FROM a.started_at) * 1000000)::bigint = $3
      AND b.id = a.build_id AND b.attempt = a.attempt AND b.state = 'running'
    RETURNING r.number, coalesce(a.slot, 0) AS slot, a.lock_units
), units AS (
    SELECT l.number, split_part(u, '#', 2)::integer AS unit
    FROM counted c CROSS JOIN unnest(c.lock_units) AS u JOIN farm.build_locks l ON l.name = split_part(u, '#', 1)
)
SELECT c.number, c.slot, ARRAY(SELECT number FROM units ORDER BY number, unit) AS lock_numbers, ARRAY(SELECT unit FROM units ORDER BY number, unit) AS lock_units
FROM counted c

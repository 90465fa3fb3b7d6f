-- Settles what hangs on builds that have ended, through any depth, for about so long; comes back with how many it settled, and with
-- the ended builds that something may still hang on.
-- $1 bigint[]  builds that have ended    $2 float8  seconds
-- Locks: the queue rows and builds of what hangs on them, for the length of this statement; waits for nobody.
SELECT settled, left_over FROM farm.build_needs_follow($1, $2)

-- Settles what was to happen to waiting builds at a moment when their row was locked, or in sight of nobody: those that somebody wants
-- cancelled, and those that a newer build of their coalesce_key takes the place of. Comes back with how many were settled, and where the next
-- call begins: null, once all have been looked at.
-- $1 bigint  the build to begin with; null: at the first    $2 integer  at most so many of each
-- Locks: those queue rows and their builds, for the length of this statement; waits for nobody.
SELECT settled, next FROM farm.build_settle_some($1, $2)

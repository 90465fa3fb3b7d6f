-- Stores when a schedule comes next, unless somebody else has, or has changed it.
-- $1 text  name    $2 text  cron, $3 text  time_zone: what $4 was worked out from    $4 timestamptz  next occurrence
-- Locks: that row, for the length of this statement.
UPDATE farm.build_schedules SET next_at = $4, detail = NULL
WHERE name = $1 AND cron = $2 AND time_zone = $3 AND enabled AND next_at IS NULL

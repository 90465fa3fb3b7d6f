-- Disables a schedule that never comes or that has no meaning, and says why.
-- $1 text  name    $2 text  cron, $3 text  time_zone: what is refused    $4 text  why
-- Locks: that row, for the length of this statement.
UPDATE farm.build_schedules SET enabled = false, next_at = NULL, detail = $4
WHERE name = $1 AND cron = $2 AND time_zone = $3 AND enabled

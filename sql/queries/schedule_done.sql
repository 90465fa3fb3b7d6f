-- Moves a schedule that this transaction has locked on to its next occurrence.
-- $1 text  name    $2 timestamptz  next occurrence    $3 bigint  the build that was queued
UPDATE farm.build_schedules SET next_at = $2, last_at = clock_timestamp(), last_build_id = $3, detail = NULL WHERE name = $1

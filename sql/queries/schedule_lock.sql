-- Takes a due schedule for the rest of the transaction. No row: another daemon has it or has done it, somebody has changed it,
-- or the occurrence worked out to follow has come as well meanwhile (then look again: it would be a second build).
-- $1 text  name    $2 text  cron, $3 text  time_zone    $4 timestamptz  next_at as it was seen    $5 timestamptz  what follows
-- Locks: that row, until COMMIT.
SELECT name FROM farm.build_schedules
WHERE name = $1 AND cron = $2 AND time_zone = $3 AND enabled AND next_at = $4
  AND next_at <= clock_timestamp() AND $5::timestamptz > clock_timestamp()
FOR NO KEY UPDATE SKIP LOCKED

-- Schedules that have something to do: to be planned (next_at null), or due. now is the server's clock.
-- $1 text[]  names to leave out    $2 bigint  at most this many
SELECT name, cron, time_zone, next_at, clock_timestamp() AS now FROM farm.build_schedules
WHERE enabled AND (next_at IS NULL OR next_at <= clock_timestamp()) AND NOT name = ANY ($1)
ORDER BY next_at NULLS FIRST LIMIT $2

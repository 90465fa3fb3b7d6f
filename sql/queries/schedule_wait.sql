-- Seconds until the next schedule is due; null: none is planned. May be negative.
-- $1 text[]  names to leave out
SELECT extract(epoch FROM min(next_at) - clock_timestamp())::float8 AS seconds FROM farm.build_schedules
WHERE enabled AND NOT name = ANY ($1)

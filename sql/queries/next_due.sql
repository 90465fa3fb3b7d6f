-- Seconds until the next scheduled row is due; null: none. May be negative.
SELECT extract(epoch FROM min(run_after) - clock_timestamp())::float8 AS seconds FROM farm.build_queue WHERE NOT ready AND needs = '{}'

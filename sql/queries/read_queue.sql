-- What waits, in the order in which it may start; the number of all that wait comes with each row.
-- $1 bigint  only this build; null: all    $2 bigint  at most this many rows
-- expected_seconds: until its start, if builds take their usual time; null when nobody would start it. May be negative.
SELECT build_id, builder, position, extract(epoch FROM waiting)::float8 AS waiting_seconds,
       extract(epoch FROM expected_start - clock_timestamp())::float8 AS expected_seconds,
       waiting_because, count(*) OVER () AS total
FROM farm.queue_status
WHERE $1::bigint IS NULL OR build_id = $1
LIMIT $2

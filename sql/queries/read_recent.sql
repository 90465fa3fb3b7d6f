-- What finished last, newest first.
-- $1 bigint  at most this many, of the 100 that recent_builds has
-- ran_seconds: its last attempt; null where it never ran. ago_seconds: since it finished.
SELECT build_id, builder, state::text AS state, attempt, worker, detail, extract(epoch FROM ran)::float8 AS ran_seconds,
       extract(epoch FROM clock_timestamp() - finished_at)::float8 AS ago_seconds
FROM farm.recent_builds
LIMIT $1

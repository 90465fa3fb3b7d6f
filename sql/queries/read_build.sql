-- One build as it is now; no row: there is no such build.
-- $1 bigint  build
-- ran_seconds: of the last attempt, once it is over. last_ended: that attempt is not running (any more).
SELECT b.builder, b.state::text AS state, farm.build_state_is_final(b.state) AS final, b.attempt, b.state <> 'running' AS last_ended,
       b.worker, b.detail, extract(epoch FROM b.finished_at - b.started_at)::float8 AS ran_seconds
FROM farm.builds b
WHERE b.id = $1

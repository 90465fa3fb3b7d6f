-- Deletes some finished builds of a builder with their attempts and logs, the oldest first, and says how many, and when the
-- last of them finished: the next call begins there, or it would walk all that earlier ones left dead behind a held claim.
-- $1 text  builder    $2 timestamptz, $3 bigint  what is kept begins with this (finished_at, id): see prune_next.sql
-- $4 timestamptz  where to begin; null: at the oldest    $5 bigint  at most this many
-- Builds that a waiting build needs stay (as in prune_builds), and so does what others hold.
-- Locks: those builds (FOR UPDATE, none waited for), then their attempts and logs, until the end of this statement.
WITH old AS MATERIALIZED (
    SELECT b.id, b.finished_at FROM farm.builds b
    WHERE b.builder = $1 AND b.finished_at >= coalesce($4::timestamptz, '-infinity') AND b.finished_at <= $2
      AND (b.finished_at, b.id) < ($2, $3) AND isfinite(b.finished_at)
      AND NOT EXISTS (SELECT FROM farm.build_queue q WHERE q.needs <> '{}' AND q.needs @> ARRAY[b.id])
    ORDER BY b.finished_at LIMIT $5 FOR UPDATE SKIP LOCKED
), deleted AS (
    -- As an array: looked up by the primary key, whatever the planner makes of $5.
    DELETE FROM farm.builds WHERE id = ANY (ARRAY(SELECT id FROM old)) RETURNING id
)
SELECT (SELECT count(*) FROM deleted) AS deleted, (SELECT max(finished_at) FROM old) AS reached

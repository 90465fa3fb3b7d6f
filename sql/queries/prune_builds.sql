-- Deletes some finished builds of a builder with their attempts and logs, the oldest first. Says how many, how many it looked at, what keeps
-- others, and which was the last: the next call begins after it, or it would walk all that earlier ones left dead behind a held claim.
-- $1 text  builder    $2 timestamptz, $3 bigint  what is kept begins with this (finished_at, id): see prune_next.sql
-- $4 timestamptz, $5 bigint  after which to begin; null: at the oldest    $6 bigint  at most this many
-- Builds that a waiting build needs, or that people's own tables or triggers hold, stay (as in prune_builds), and so does what others hold.
-- Locks: those builds (FOR UPDATE, none waited for), then their attempts and logs, until the end of this statement.
WITH old AS MATERIALIZED (
    SELECT b.id, b.finished_at FROM farm.builds b
    WHERE b.builder = $1 AND b.finished_at >= coalesce($4::timestamptz, '-infinity') AND b.finished_at <= $2
      AND (b.finished_at, b.id) < ($2, $3) AND ($4::timestamptz IS NULL OR (b.finished_at, b.id) > ($4, $5::bigint)) AND isfinite(b.finished_at)
      AND NOT EXISTS (SELECT FROM farm.build_queue q WHERE q.needs <> '{}' AND q.needs @> ARRAY[b.id])
    ORDER BY b.finished_at, b.id LIMIT $6 FOR UPDATE SKIP LOCKED
), pruned AS MATERIALIZED (
    SELECT p.deleted, p.kept FROM farm.build_prune(ARRAY(SELECT id FROM old)) p
)
SELECT p.deleted, p.kept, (SELECT count(*) FROM old) AS looked, o.finished_at, o.id
FROM pruned p LEFT JOIN (SELECT finished_at, id FROM old ORDER BY finished_at DESC, id DESC LIMIT 1) o ON true

-- Rows that became visible since an earlier snapshot of this session, and the snapshot of now.
-- $1 text    xmax of the earlier snapshot: the first transaction that had not begun
-- $2 text[]  transactions that were under way then
-- $3 text[]  builders    $4 integer  at most this many
-- due_seconds: of a row that waits for run_after, the time until it is due. needy: it waits for other builds, or may take the place of others.
-- Exactly the rows whose writer was not visible then: no cursor of a highest id, which would miss ids that commit out of
-- order. What bears a transaction that has not begun here comes from a dump of another cluster: it was there before, or look_all finds it.
-- Touches no row that an older transaction wrote, so dead rows behind a held claim cost nothing.
SELECT pg_current_snapshot()::text AS snapshot, q.build_id, q.builder, q.priority,
       q.ready, q.needs <> '{}' OR q.coalesce_key IS NOT NULL AS needy,
       CASE WHEN NOT q.ready THEN extract(epoch FROM q.run_after - clock_timestamp())::float8 END AS due_seconds
FROM (VALUES (1)) AS one
LEFT JOIN (
    SELECT * FROM (
        SELECT build_id, builder, priority, ready, run_after, needs, coalesce_key FROM farm.build_queue
        WHERE queued_xid >= $1::text::xid8 AND queued_xid < pg_snapshot_xmax(pg_current_snapshot())
        UNION ALL
        SELECT build_id, builder, priority, ready, run_after, needs, coalesce_key FROM farm.build_queue
        WHERE queued_xid = ANY ($2::text[]::xid8[]) AND queued_xid < $1::text::xid8
    ) w
    WHERE builder = ANY ($3::text[])
    LIMIT $4::integer
) q ON true

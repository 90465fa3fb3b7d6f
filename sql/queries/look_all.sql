-- The first candidates of each builder, and the snapshot they were seen in.
-- $1 text[]  builders    $2 integer  how many of each, on top of those that may be running at the head
-- Takes no row lock. Walks dead rows at the head of each builder's part of the index, so it is for a start, a dry store, and now and then.
SELECT pg_current_snapshot()::text AS snapshot, q.build_id, q.builder, q.priority
FROM (VALUES (1)) AS one
LEFT JOIN (
    SELECT h.build_id, h.builder, h.priority
    FROM unnest($1::text[]) AS n(name)
    JOIN farm.builders r ON r.name = n.name
    CROSS JOIN LATERAL (
        SELECT w.build_id, w.builder, w.priority FROM farm.build_queue w
        WHERE w.builder = r.name AND w.ready
        ORDER BY w.priority DESC, w.build_id
        LIMIT $2::integer + r.max_running
    ) h
) q ON true

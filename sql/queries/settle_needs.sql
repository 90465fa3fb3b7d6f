-- Builds that have ended and that waiting builds still name in their needs: for build_needs_follow.
-- $1 integer  at most so many
SELECT coalesce(array_agg(e.id), '{}') AS ended FROM (
    SELECT DISTINCT b.id FROM farm.build_queue q CROSS JOIN unnest(q.needs) AS n JOIN farm.builds b ON b.id = n
    WHERE q.needs <> '{}' AND farm.build_state_is_final(b.state) LIMIT $1::integer
) e

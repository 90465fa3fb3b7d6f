-- Takes one mail: a row, or all rows of its digest, which keep together for ever, or ($2) what is due to its address as a new digest.
-- $1 row  $2 boolean: gather a digest  $3 the most rows of one  $4 who sends  $5 seconds until others may take it over
-- $6 the first that is open of its address
-- What is joined elsewhere is asked for by values here, and the rows by next_at and not by their state, which a CHECK ties to it: or the
-- planner reads all of a small index, dead entries included.
-- Locks: those rows of build_mail, until the COMMIT that follows.
WITH first AS (
    SELECT m.id, m.address, m.digest FROM farm.build_mail m WHERE m.id = $1::bigint
), wanted AS (
    SELECT f.id FROM first f
    UNION
    SELECT m.id FROM farm.build_mail m WHERE m.digest = (SELECT f.digest FROM first f) AND m.state IN ('waiting', 'sending')
    UNION
    (SELECT m.id FROM farm.build_mail m
     WHERE $2::boolean AND lower(m.address) = (SELECT lower(f.address) FROM first f) AND m.id >= $6::bigint AND m.digest IS NULL AND m.state IN ('waiting', 'sending') AND m.next_at <= now()
     ORDER BY m.id LIMIT $3::bigint)
)
UPDATE farm.build_mail m
SET state = 'sending', tries = m.tries + 1, sender = $4::text, next_at = clock_timestamp() + make_interval(secs => $5::float8),
    digest = CASE WHEN $2::boolean THEN $1::bigint ELSE m.digest END
FROM wanted w WHERE m.id = w.id AND m.next_at IS NOT NULL
RETURNING m.id, m.build_id, m.attempt, m.builder, m.branch, m.event, m.verdict::text AS verdict, m.previous_build_id,
          m.previous_state::text AS previous_state, m.good_build_id, m.address, m.message_id, m.thread, m.created_at, m.tries,
          m.digest IS NOT NULL AS digest

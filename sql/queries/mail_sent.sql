-- The mail server has taken these; even where somebody else has claimed them meanwhile.
-- next_at and not the state, which a CHECK ties to it: by the state the planner reads all of a small index, dead entries included.
-- $1 rows
UPDATE farm.build_mail m
SET state = 'sent', sent_at = clock_timestamp(), next_at = NULL, sender = NULL, last_error = NULL
WHERE m.id = ANY ($1::bigint[]) AND m.next_at IS NOT NULL

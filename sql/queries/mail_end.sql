-- These are not sent.
-- By the sender, whom only a mail that is being sent has: by the state the planner reads all of a small index, dead entries included.
-- $1 rows  $2 who sends  $3 parked or discarded  $4 why
UPDATE farm.build_mail m
SET state = $3::text, next_at = NULL, sender = NULL, last_error = $4::text
WHERE m.id = ANY ($1::bigint[]) AND m.sender = $2::text

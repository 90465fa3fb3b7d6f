-- These are tried again, or parked when their time is over.
-- By the sender, whom only a mail that is being sent has: by the state the planner reads all of a small index, dead entries included.
-- $1 rows  $2 who sends  $3 why  $4 seconds until the next try
UPDATE farm.build_mail m
SET state = CASE WHEN m.give_up_at <= clock_timestamp() THEN 'parked' ELSE 'waiting' END,
    next_at = CASE WHEN m.give_up_at > clock_timestamp() THEN clock_timestamp() + make_interval(secs => $4::float8) END,
    sender = NULL, last_error = $3::text
WHERE m.id = ANY ($1::bigint[]) AND m.sender = $2::text
RETURNING m.state

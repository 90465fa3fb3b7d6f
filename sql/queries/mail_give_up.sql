-- While nothing can be sent: parks what has waited for too long.
-- $1 why
UPDATE farm.build_mail m
SET state = 'parked', next_at = NULL, last_error = $1::text
WHERE m.state = 'waiting' AND m.next_at <= now() AND m.give_up_at <= clock_timestamp()

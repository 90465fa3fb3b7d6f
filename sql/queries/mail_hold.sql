-- Puts off what is due to an address that has had enough for now.
-- $1 address  $2 until when  $3 the first that is open
-- Locks: rows of build_mail, until the COMMIT that follows.
UPDATE farm.build_mail m SET state = 'waiting', sender = NULL, next_at = $2::timestamptz
WHERE lower(m.address) = lower($1::text) AND m.id >= $3::bigint AND m.state IN ('waiting', 'sending') AND m.next_at <= now()

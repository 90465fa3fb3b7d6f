-- What a sender has at hand while it sends nothing: the answer was lost when it took it, or when it said what became of it. Due at once.
-- $1 who sends
-- Locks: rows of build_mail, until the COMMIT that follows.
UPDATE farm.build_mail m SET state = 'waiting', sender = NULL, next_at = clock_timestamp()
WHERE m.state IN ('waiting', 'sending') AND m.sender = $1::text

-- The mail that is due first, locked; also one whose sender has not said in time what became of it. now(), because the index is to be
-- read up to it and no further; and from $1 on, because before that there may be nothing but dead entries, many of them.
-- $1 where the outbox begins, by next_at; null: not known
-- Locks: that row of build_mail. One that another daemon is claiming is passed over.
SELECT m.id, m.address, m.digest, m.next_at
FROM farm.build_mail m
WHERE m.state IN ('waiting', 'sending') AND m.next_at >= coalesce($1::timestamptz, '-infinity') AND m.next_at <= now()
ORDER BY m.next_at, m.id LIMIT 1 FOR UPDATE SKIP LOCKED

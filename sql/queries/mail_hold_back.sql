-- Puts off what is due and over a limit, or parks it when its time is over. What keeps together in a digest has been counted already.
-- $1 all, submitter or mailbox  $2 the submitter  $3 the mailbox  $4 until when  $5 why  $6 where the outbox begins, by next_at; null: not known
-- Locks: rows of build_mail, until the COMMIT that follows.
UPDATE farm.build_mail m
SET state = CASE WHEN m.give_up_at <= clock_timestamp() THEN 'parked' ELSE 'waiting' END,
    next_at = CASE WHEN m.give_up_at > clock_timestamp() THEN $4::timestamptz END,
    sender = NULL, last_error = $5::text
WHERE m.state IN ('waiting', 'sending') AND m.next_at >= coalesce($6::timestamptz, '-infinity') AND m.next_at <= now()
  AND m.submitter IS NOT NULL AND m.digest IS NULL
  AND CASE $1::text WHEN 'all' THEN true WHEN 'submitter' THEN m.submitter = $2::text ELSE farm.mail_mailbox(m.address) = $3::text END

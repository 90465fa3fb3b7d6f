-- Seconds until the next mail is due, by the server's clock; null: none is within $2. since: where the next look begins, when nothing was
-- due now: a transaction that writes a mail may be open for half a minute before the mail is seen.
-- $1 where the outbox begins, by next_at; null: not known  $2 seconds to look ahead: beyond, mails that were being sent left dead entries
SELECT extract(epoch FROM (SELECT m.next_at FROM farm.build_mail m
                           WHERE m.state IN ('waiting', 'sending') AND m.next_at >= coalesce($1::timestamptz, '-infinity')
                             AND m.next_at <= now() + make_interval(secs => $2::float8)
                           ORDER BY m.next_at LIMIT 1)
                          - clock_timestamp())::float8 AS seconds,
       clock_timestamp() - interval '30 s' AS since

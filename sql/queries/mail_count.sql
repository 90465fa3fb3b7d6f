-- How many mails an address has had in the last hour or is getting now, how many wait for it, and when it may get the next. A digest is one.
-- first: the first of those that are open; its index may have many dead entries before it.
-- $1 address  $2 mails an hour  $3 the first that is open, as far as is known; 0: not known
WITH sent AS MATERIALIZED (
    SELECT max(m.sent_at) AS at FROM farm.build_mail m
    WHERE lower(m.address) = lower($1::text) AND m.state = 'sent' AND m.sent_at > now() - interval '1 hour'
    GROUP BY coalesce(m.digest, m.id)
), open AS MATERIALIZED (
    SELECT m.state, m.next_at, m.digest, m.id FROM farm.build_mail m
    WHERE lower(m.address) = lower($1::text) AND m.id >= $3::bigint AND m.state IN ('waiting', 'sending')
)
SELECT (SELECT count(*) FROM sent) + (SELECT count(DISTINCT coalesce(o.digest, o.id)) FROM open o WHERE o.state = 'sending' AND o.next_at > now()) AS used,
       (SELECT count(*) FROM open o WHERE o.digest IS NULL AND o.next_at <= now()) AS due,
       coalesce((SELECT s.at FROM sent s ORDER BY s.at DESC OFFSET $2::bigint - 1 LIMIT 1) + interval '1 hour',
                clock_timestamp() + interval '1 minute') AS free_at,
       (SELECT coalesce(min(o.id), 0) FROM open o) AS first

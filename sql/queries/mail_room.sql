-- Whether a mail that a build's own notify has caused is within the limits: comes back with the first one that is used up, and when a tenth
-- of it is free again. What people have subscribed to has no such limits. A digest is one mail. What is being sent just now does not
-- count: that is one mail a daemon.
-- $1 row  $2 mails an hour to a mailbox, whatever the +tag  $3 to one submitter's builds  $4 in all
WITH mail AS MATERIALIZED (
    SELECT m.submitter, farm.mail_mailbox(m.address) AS mailbox FROM farm.build_mail m
    WHERE m.id = $1::bigint AND m.submitter IS NOT NULL AND m.digest IS NULL
), sent AS MATERIALIZED (
    SELECT max(m.sent_at) AS at, bool_or(m.submitter = f.submitter) AS of_submitter, bool_or(farm.mail_mailbox(m.address) = f.mailbox) AS of_mailbox
    FROM mail f JOIN farm.build_mail m ON m.state = 'sent' AND m.submitter IS NOT NULL AND m.sent_at > now() - interval '1 hour'
    GROUP BY coalesce(m.digest, m.id)
)
SELECT l.scope, f.submitter, f.mailbox, u.free_at
FROM mail f
CROSS JOIN (VALUES (1, 'all', $4::bigint), (2, 'submitter', $3::bigint), (3, 'mailbox', $2::bigint)) AS l(rank, scope, most)
CROSS JOIN LATERAL (
    SELECT s.at + interval '1 hour' AS free_at FROM sent s
    WHERE l.scope = 'all' OR (l.scope = 'submitter' AND s.of_submitter) OR (l.scope = 'mailbox' AND s.of_mailbox)
    ORDER BY s.at DESC OFFSET l.most - greatest(l.most / 10, 1) LIMIT 1
) u
WHERE l.most <= (SELECT count(*) FROM sent s
                 WHERE l.scope = 'all' OR (l.scope = 'submitter' AND s.of_submitter) OR (l.scope = 'mailbox' AND s.of_mailbox))
ORDER BY l.rank LIMIT 1

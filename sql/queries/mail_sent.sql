-- The mail server has taken these; even where somebody else has claimed them meanwhile.
-- $1 rows
UPDATE build_mail m
SET state = 'sent', sent_at = clock_timestamp(), next_at = NULL, sender = NULL, last_error = NULL
WHERE m.id = ANY ($1::bigint[]) AND m.state IN ('waiting', 'sending')

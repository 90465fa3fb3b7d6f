-- Limits of the mails that a build's own notify causes, and text that every database can hold.

CREATE FUNCTION mail_mailbox(address text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_catalog.lower(pg_catalog.regexp_replace(address, '[+][^@]*@', '@'));
COMMENT ON FUNCTION mail_mailbox(text) IS 'A mail address in lower case and without a +tag: ann+builds@Example.org is in the mailbox ann@example.org.';

ALTER TABLE build_mail ADD COLUMN submitter text;
COMMENT ON COLUMN build_mail.submitter IS 'Who asked for the build, where the build''s own notify names the address; null: the address has subscribed.';
-- What notify has caused within the last hour.
CREATE INDEX build_mail_notified ON build_mail (sent_at) WHERE state = 'sent' AND submitter IS NOT NULL;

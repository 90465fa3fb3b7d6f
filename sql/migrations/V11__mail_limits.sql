-- Limits of the mails that a build's own notify causes, and text that every database can hold.

CREATE FUNCTION mail_mailbox(address text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_catalog.lower(pg_catalog.regexp_replace(address, '[+][^@]*@', '@'));
COMMENT ON FUNCTION mail_mailbox(text) IS 'A mail address in lower case and without a +tag: ann+builds@Example.org is in the mailbox ann@example.org.';

ALTER TABLE build_mail ADD COLUMN submitter text;
COMMENT ON COLUMN build_mail.submitter IS 'Who asked for the build, where the build''s own notify names the address; null: the address has subscribed.';
-- What notify has caused within the last hour.
CREATE INDEX build_mail_notified ON build_mail (sent_at) WHERE state = 'sent' AND submitter IS NOT NULL;

CREATE FUNCTION build_characters_fit(characters bytea[]) RETURNS boolean[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one bytea;
    fits boolean[] := '{}';
BEGIN
    FOREACH one IN ARRAY characters LOOP
        BEGIN
            PERFORM convert_from(one, 'UTF8');
            fits := fits || true;
        EXCEPTION WHEN OTHERS THEN
            fits := fits || false;
        END;
    END LOOP;
    RETURN fits;
END $$;
COMMENT ON FUNCTION build_characters_fit(bytea[]) IS 'Which of these characters, each in UTF-8, the encoding of this database has: a daemon replaces the others before it writes a text.';

-- A database in SQL_ASCII takes any bytes. Text that is not UTF-8 could not be read by a daemon: it is refused when it is written.
DO $do$
DECLARE
    place text;
BEGIN
    IF getdatabaseencoding() = 'SQL_ASCII' THEN
        CREATE FUNCTION build_text_is_utf8() RETURNS trigger
            LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            PERFORM convert_from(convert_to(NEW::text, 'SQL_ASCII'), 'UTF8');
            RETURN NEW;
        EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
            RAISE EXCEPTION 'a text of this row is not valid UTF-8' USING ERRCODE = 'character_not_in_repertoire',
                DETAIL = SQLERRM, HINT = 'This database has the encoding SQL_ASCII and converts nothing: write texts in UTF-8.';
        END $$;
        COMMENT ON FUNCTION build_text_is_utf8() IS 'Trigger, in databases with the encoding SQL_ASCII: texts that are not valid UTF-8 are refused.';
        FOREACH place IN ARRAY ARRAY['builders', 'build_queue', 'build_schedules', 'build_subscriptions', 'build_locks'] LOOP
            EXECUTE format('CREATE TRIGGER a_encoding BEFORE INSERT OR UPDATE ON %I FOR EACH ROW EXECUTE FUNCTION build_text_is_utf8()', place);
        END LOOP;
        CREATE TRIGGER a_encoding BEFORE INSERT OR UPDATE OF properties, reason, notify, submitted_by, cancel_reason ON builds
            FOR EACH ROW EXECUTE FUNCTION build_text_is_utf8();
    END IF;
END $do$;

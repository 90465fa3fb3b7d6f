-- The outbox: written with the result, steered by people.

CREATE OR REPLACE FUNCTION farm.build_mails() RETURNS trigger
    -- Its plans do not depend on the values: planned for each, they would cost twice what they do.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_variable
DECLARE
    by_property text;
    branch text;
    kept text;
    event text;
    fits text[];
    good record;
    bad record;
    own record;
    previous_id bigint;
    previous_state farm.build_state;
    previous_at timestamptz;
BEGIN
    -- As a rule nobody has asked.
    IF NEW.notify = '{}' AND NOT EXISTS (SELECT FROM farm.build_subscriptions s WHERE coalesce(s.builder, '') IN (NEW.builder, '')) THEN
        RETURN NULL;
    END IF;
    SELECT r.branch_property INTO by_property FROM farm.builders r WHERE r.name = NEW.builder;
    -- Cut, because an index holds it.
    branch := coalesce(left(NEW.properties ->> by_property, 200), '');
    -- In a database that counts bytes it may be cut within a character, and nobody could read the row.
    kept := CASE WHEN getdatabaseencoding() = 'SQL_ASCII' AND length(NEW.properties ->> by_property) > 200
                 THEN coalesce(substring(branch FROM '^(.*[ -~])?'), '') ELSE branch END;

    -- The last builds that passed and that did not. One probe each; by branch, among the last 1000 of the builder.
    SELECT p.id, p.finished_at INTO good
    FROM (SELECT b.id, b.finished_at, b.properties FROM farm.builds b
          WHERE b.builder = NEW.builder AND b.state = 'passed' AND b.id <> NEW.id
          ORDER BY b.finished_at DESC LIMIT 1000) p
    WHERE by_property IS NULL OR coalesce(left(p.properties ->> by_property, 200), '') = branch
    ORDER BY p.finished_at DESC LIMIT 1;
    SELECT p.id, p.state, p.finished_at INTO bad
    FROM (SELECT b.id, b.state, b.finished_at, b.properties FROM farm.builds b
          WHERE b.builder = NEW.builder AND b.state IN ('failed', 'timed_out') AND b.id <> NEW.id
          ORDER BY b.finished_at DESC LIMIT 1000) p
    WHERE by_property IS NULL OR coalesce(left(p.properties ->> by_property, 200), '') = branch
    ORDER BY p.finished_at DESC LIMIT 1;
    -- Run again: the verdict that it had has been overwritten. Attempts since it was queued are tries of retry_failed, no verdicts.
    SELECT a.state, a.finished_at INTO own
    FROM farm.build_attempts a
    WHERE a.build_id = NEW.id AND a.attempt < NEW.attempt AND a.started_at < NEW.queued_at AND a.state IN ('passed', 'failed', 'timed_out')
    ORDER BY a.attempt DESC LIMIT 1;
    IF own.state = 'passed' AND (good.id IS NULL OR own.finished_at > good.finished_at) THEN
        SELECT NEW.id AS id, own.finished_at AS finished_at INTO good;
    ELSIF own.state <> 'passed' AND (bad.id IS NULL OR own.finished_at > bad.finished_at) THEN
        SELECT NEW.id AS id, own.state::text::farm.build_state AS state, own.finished_at AS finished_at INTO bad;
    END IF;
    IF bad.id IS NOT NULL AND (good.id IS NULL OR bad.finished_at > good.finished_at) THEN
        previous_id := bad.id;
        previous_state := bad.state;
    ELSIF good.id IS NOT NULL THEN
        previous_id := good.id;
        previous_state := 'passed';
    END IF;

    event := CASE WHEN NEW.state = 'error' THEN 'error'
                  WHEN NEW.state = 'passed' AND previous_state <> 'passed' THEN 'fixed'
                  WHEN NEW.state = 'passed' THEN 'passed'
                  WHEN previous_state <> 'passed' THEN 'still_failing'
                  ELSE 'problem' END;
    -- What people may have asked for that this is.
    fits := CASE event WHEN 'error' THEN '{error}'
                       WHEN 'fixed' THEN '{finished,passed,fixed}'
                       WHEN 'passed' THEN '{finished,passed}'
                       ELSE ARRAY['finished', 'failed', event] END;
    INSERT INTO farm.build_mail (build_id, attempt, builder, branch, event, verdict, previous_build_id, previous_state, good_build_id,
                            address, submitter, message_id, thread)
    SELECT NEW.id, NEW.attempt, NEW.builder, kept, event, NEW.state, previous_id, previous_state, good.id,
           w.address, w.submitter, w.message_id, coalesce(t.thread, w.message_id)
    FROM (
        -- The time tells farms that use one domain apart.
        SELECT DISTINCT ON (lower(a.address)) a.address, a.submitter,
               format('%s.%s.%s.%s.%s', NEW.id, NEW.attempt, event, left(md5(lower(a.address)), 12),
                      (extract(epoch FROM NEW.finished_at) * 1000000)::bigint) AS message_id
        FROM (SELECT s.address, NULL AS submitter FROM farm.build_subscriptions s WHERE coalesce(s.builder, '') IN (NEW.builder, '') AND s.events && fits
              UNION ALL
              SELECT n, NEW.submitted_by FROM unnest(NEW.notify) AS n WHERE event <> 'error') a
        -- Who has subscribed hears of it whatever the submitter's limits.
        ORDER BY lower(a.address), a.submitter NULLS FIRST, a.address
    ) w
    LEFT JOIN LATERAL (
        SELECT m.thread FROM farm.build_mail m
        WHERE event IN ('still_failing', 'fixed') AND m.builder = NEW.builder AND lower(m.address) = lower(w.address) AND m.branch = kept
          AND m.event IN ('problem', 'still_failing') AND (good.id IS NULL OR m.created_at > good.finished_at)
        ORDER BY m.id DESC LIMIT 1
    ) t ON true
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION farm.build_mails() IS 'Trigger: a build that ends with a verdict, or in error, writes a mail for each address that wants to hear of it, in the same transaction.';

CREATE OR REPLACE TRIGGER mails AFTER UPDATE OF state ON farm.builds FOR EACH ROW
    WHEN (NEW.state IN ('passed', 'failed', 'timed_out', 'error') AND NOT farm.build_state_is_final(OLD.state)) EXECUTE FUNCTION farm.build_mails();

CREATE OR REPLACE VIEW farm.mail_status AS
SELECT m.id AS mail_id,
       m.build_id,
       m.builder,
       m.event,
       m.address,
       m.state,
       date_trunc('seconds', clock_timestamp() - m.created_at) AS age,
       m.tries,
       CASE WHEN m.state = 'waiting' THEN greatest('0', date_trunc('seconds', m.next_at - clock_timestamp())) END AS next_try_in,
       m.last_error,
       m.sent_at
FROM farm.build_mail m
WHERE m.state IN ('waiting', 'sending', 'parked') OR m.created_at > clock_timestamp() - interval '1 day'
ORDER BY CASE m.state WHEN 'parked' THEN 0 WHEN 'sending' THEN 1 WHEN 'waiting' THEN 2 ELSE 3 END, m.id DESC;
COMMENT ON VIEW farm.mail_status IS 'Mails: those that were parked first, then those on their way, then what became of the others of the last day.';
COMMENT ON COLUMN farm.mail_status.mail_id IS 'Number of the mail, for retry_mail(id) and discard_mail(id).';
COMMENT ON COLUMN farm.mail_status.build_id IS 'The build that it is about.';
COMMENT ON COLUMN farm.mail_status.builder IS 'Its builder.';
COMMENT ON COLUMN farm.mail_status.event IS 'What happened: passed, problem, still_failing, fixed or error.';
COMMENT ON COLUMN farm.mail_status.address IS 'To whom.';
COMMENT ON COLUMN farm.mail_status.state IS 'parked (refused, or given up), sending, waiting, sent or discarded.';
COMMENT ON COLUMN farm.mail_status.age IS 'Since the build ended.';
COMMENT ON COLUMN farm.mail_status.tries IS 'How often it was tried.';
COMMENT ON COLUMN farm.mail_status.next_try_in IS 'How long until it is tried, for one that waits.';
COMMENT ON COLUMN farm.mail_status.last_error IS 'Why the last try failed, in the mail server''s words.';
COMMENT ON COLUMN farm.mail_status.sent_at IS 'When the mail server took it.';

CREATE OR REPLACE FUNCTION farm.retry_mail(id bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
    now_state text;
BEGIN
    SELECT m.state INTO now_state FROM farm.build_mail m WHERE m.id = $1 FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no mail %', $1 USING ERRCODE = 'no_data_found', HINT = 'SELECT * FROM mail_status;';
    END IF;
    IF now_state IN ('sent', 'sending') THEN
        RETURN CASE now_state WHEN 'sent' THEN 'it was sent' ELSE 'it is being sent' END;
    END IF;
    -- A parked one leaves its digest: it is tried alone.
    UPDATE farm.build_mail m
    SET state = 'waiting', next_at = clock_timestamp(), give_up_at = clock_timestamp() + interval '2 days',
        digest = CASE WHEN m.state = 'waiting' THEN m.digest END
    WHERE m.id = $1;
    RETURN 'it will be sent within seconds, if a daemon with [mail] runs';
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'mail % is held by somebody''s open transaction', $1 USING ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended.';
END $$;
COMMENT ON FUNCTION farm.retry_mail(bigint) IS 'Has a mail that was parked, was discarded or waits for its next try sent now, and for two more days if need be.';

CREATE OR REPLACE FUNCTION farm.discard_mail(id bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_variable
DECLARE
    now_state text;
BEGIN
    SELECT m.state INTO now_state FROM farm.build_mail m WHERE m.id = $1 FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no mail %', $1 USING ERRCODE = 'no_data_found', HINT = 'SELECT * FROM mail_status;';
    END IF;
    IF now_state IN ('sent', 'sending', 'discarded') THEN
        RETURN CASE now_state WHEN 'sent' THEN 'it was sent' WHEN 'sending' THEN 'it is being sent' ELSE 'it was discarded already' END;
    END IF;
    UPDATE farm.build_mail m
    SET state = 'discarded', next_at = NULL, last_error = concat_ws(': ', 'discarded by ' || session_user, m.last_error)
    WHERE m.id = $1;
    RETURN 'discarded';
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'mail % is held by somebody''s open transaction', $1 USING ERRCODE = 'lock_not_available', HINT = 'Try again when that transaction has ended.';
END $$;
COMMENT ON FUNCTION farm.discard_mail(bigint) IS 'Has a mail that waits, or was parked, never sent.';

-- As the functions that steer the queue.
REVOKE EXECUTE ON FUNCTION farm.retry_mail(bigint), farm.discard_mail(bigint) FROM PUBLIC;

-- Mail that says what happened: who wants to hear what, and an outbox that is written with the result.

CREATE FUNCTION mail_addresses_are_valid(addresses text[]) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN cardinality(addresses) <= 100 AND NOT EXISTS (
        SELECT FROM unnest(addresses) AS a
        WHERE a IS NULL OR octet_length(a) > 254 OR a ~ '[[:space:][:cntrl:]<>(),;:"\\]|\[|\]' OR a !~ '^[^@]+@[^@.]([^@]*[^@.])?$');
COMMENT ON FUNCTION mail_addresses_are_valid(text[]) IS 'True for at most 100 texts that look like mail addresses: ann@example.org, without a name and without angle brackets.';

ALTER TABLE builders ADD COLUMN branch_property text;
ALTER TABLE builders ADD CONSTRAINT branch_property_is_1_to_100_characters CHECK (length(branch_property) BETWEEN 1 AND 100);
COMMENT ON COLUMN builders.branch_property IS 'Name of the property that tells its branches apart, such as branch: what counts as the previous build is then the last one of the same branch. Null: the last one of the builder.';

ALTER TABLE builds
    DROP CONSTRAINT notify_is_not_supported_by_this_version,
    ADD CONSTRAINT notify_lists_at_most_100_addresses_such_as_ann_at_example_org CHECK (mail_addresses_are_valid(notify));
COMMENT ON COLUMN builds.notify IS 'Mail addresses for this build alone: they hear how it ended, unless it was cancelled, skipped, superseded or ended in error.';
-- The last build that passed and the last that did not, each found by one probe.
CREATE INDEX builds_passed ON builds (builder, finished_at DESC) WHERE state = 'passed';
CREATE INDEX builds_failed ON builds (builder, finished_at DESC) WHERE state IN ('failed', 'timed_out');

CREATE TABLE build_subscriptions (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    builder text,
    address text   NOT NULL,
    events  text[] NOT NULL DEFAULT '{problem,fixed}',
    CONSTRAINT builder_of_a_subscription_exists FOREIGN KEY (builder) REFERENCES builders (name) ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT address_looks_like_ann_at_example_org CHECK (mail_addresses_are_valid(ARRAY[address])),
    CONSTRAINT events_are_finished_passed_failed_problem_still_failing_fixed_error
        CHECK (events <> '{}' AND array_position(events, NULL) IS NULL
               AND events <@ '{finished,passed,failed,problem,still_failing,fixed,error}'::text[])
);
-- Also what each result asks: whether anybody wants to hear of it.
CREATE UNIQUE INDEX one_subscription_for_each_builder_and_address ON build_subscriptions (coalesce(builder, ''), lower(address));
COMMENT ON TABLE build_subscriptions IS 'Who gets mail about which builds. INSERT, UPDATE, DELETE as you like; it takes effect with the next build that ends.';
COMMENT ON COLUMN build_subscriptions.id IS 'Number of the subscription.';
COMMENT ON COLUMN build_subscriptions.builder IS 'Builds of this builder; null: of all.';
COMMENT ON COLUMN build_subscriptions.address IS 'Mail address, without a name: ann@example.org.';
COMMENT ON COLUMN build_subscriptions.events IS 'finished (passed, failed or timed out), passed, failed, problem (the first failure after a pass, or of a new builder), still_failing, fixed, error (the machinery failed max_attempts times). A build is one mail to an address, whatever of this fits.';

CREATE TABLE build_mail (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    build_id          bigint      NOT NULL,
    attempt           integer     NOT NULL,
    builder           text        NOT NULL,
    branch            text        NOT NULL DEFAULT '',
    event             text        NOT NULL,
    verdict           build_state NOT NULL,
    previous_build_id bigint,
    previous_state    build_state,
    good_build_id     bigint,
    address           text        NOT NULL,
    message_id        text        NOT NULL,
    thread            text        NOT NULL,
    state             text        NOT NULL DEFAULT 'waiting',
    tries             integer     NOT NULL DEFAULT 0,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    give_up_at        timestamptz NOT NULL DEFAULT clock_timestamp() + interval '2 days',
    next_at           timestamptz          DEFAULT clock_timestamp(),
    sent_at           timestamptz,
    last_error        text,
    sender            text,
    digest            bigint,
    CONSTRAINT a_mail_is_about_a_build FOREIGN KEY (build_id) REFERENCES builds (id) ON DELETE CASCADE,
    CONSTRAINT event_is_passed_problem_still_failing_fixed_or_error CHECK (event IN ('passed', 'problem', 'still_failing', 'fixed', 'error')),
    CONSTRAINT state_is_waiting_sending_sent_parked_or_discarded CHECK (state IN ('waiting', 'sending', 'sent', 'parked', 'discarded')),
    CONSTRAINT what_is_still_to_be_sent_has_a_next_at CHECK ((state IN ('waiting', 'sending')) = (next_at IS NOT NULL)),
    CONSTRAINT what_is_being_sent_has_a_sender CHECK ((state = 'sending') = (sender IS NOT NULL)),
    CONSTRAINT what_was_sent_has_a_time CHECK ((state = 'sent') = (sent_at IS NOT NULL)),
    CONSTRAINT what_was_parked_or_discarded_says_why CHECK (state NOT IN ('parked', 'discarded') OR last_error IS NOT NULL),
    CONSTRAINT tries_are_not_negative CHECK (tries >= 0)
);
-- Once, by whatever path a result is recorded.
CREATE UNIQUE INDEX one_mail_for_each_build_attempt_and_address ON build_mail (build_id, attempt, lower(address));
CREATE INDEX build_mail_due ON build_mail (next_at, id) WHERE state IN ('waiting', 'sending');
CREATE INDEX build_mail_open ON build_mail (lower(address), id) WHERE state IN ('waiting', 'sending');
CREATE INDEX build_mail_sent ON build_mail (lower(address), sent_at) WHERE state = 'sent';
CREATE INDEX build_mail_streak ON build_mail (builder, lower(address), branch, id) WHERE event IN ('problem', 'still_failing');
CREATE INDEX build_mail_digest ON build_mail (digest) WHERE digest IS NOT NULL AND state IN ('waiting', 'sending');
COMMENT ON TABLE build_mail IS 'The outbox: a row for each mail, written by the transaction that records the result, sent afterwards by any daemon with [mail]. Goes with its build. For people: mail_status, retry_mail(id), discard_mail(id).';
COMMENT ON COLUMN build_mail.id IS 'Number of the mail.';
COMMENT ON COLUMN build_mail.build_id IS 'The build.';
COMMENT ON COLUMN build_mail.attempt IS 'The attempt that it ended with.';
COMMENT ON COLUMN build_mail.builder IS 'Its builder.';
COMMENT ON COLUMN build_mail.branch IS 'Its branch, by the builder''s branch_property: the first 200 characters; empty: none.';
COMMENT ON COLUMN build_mail.event IS 'What happened: passed (and had not failed before), problem (the first failure), still_failing, fixed or error.';
COMMENT ON COLUMN build_mail.verdict IS 'The state that the build ended in.';
COMMENT ON COLUMN build_mail.previous_build_id IS 'The build whose verdict came before; the build itself where it was run again; null: none.';
COMMENT ON COLUMN build_mail.previous_state IS 'That verdict: passed, failed or timed_out.';
COMMENT ON COLUMN build_mail.good_build_id IS 'The last build before it that passed; null: none.';
COMMENT ON COLUMN build_mail.address IS 'To whom.';
COMMENT ON COLUMN build_mail.message_id IS 'Message-ID, up to the @: the same however often it is sent.';
COMMENT ON COLUMN build_mail.thread IS 'That of the mail that began the thread: the first to this address about an unbroken row of failures.';
COMMENT ON COLUMN build_mail.state IS 'waiting, sending (a daemon is at it), sent, parked (refused, or not delivered within two days), discarded.';
COMMENT ON COLUMN build_mail.tries IS 'How often it was tried.';
COMMENT ON COLUMN build_mail.created_at IS 'When the build ended.';
COMMENT ON COLUMN build_mail.give_up_at IS 'After this time a try that fails is the last.';
COMMENT ON COLUMN build_mail.next_at IS 'waiting: when it is tried next. sending: when others may take it over.';
COMMENT ON COLUMN build_mail.sent_at IS 'When the mail server took it.';
COMMENT ON COLUMN build_mail.last_error IS 'Why the last try failed, in the mail server''s words, or why it was parked or discarded.';
COMMENT ON COLUMN build_mail.sender IS 'The daemon that is sending it.';
COMMENT ON COLUMN build_mail.digest IS 'Sent together with others, as one mail: the number of the first of them.';

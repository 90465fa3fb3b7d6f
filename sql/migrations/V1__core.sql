-- The core of buildreactor: builders, builds, the queue, attempts, logs, workers.
--
-- Numbered and forward only. Every object lives in the first schema of the search_path.
-- Triggers and views are not here: they are re-created from sql/api at each migrate.
-- Constraint names are sentences, because PostgreSQL prints them to the person whose row was refused.

CREATE TYPE build_state AS ENUM
    ('described', 'queued', 'running', 'passed', 'failed', 'timed_out', 'cancelled', 'error', 'skipped', 'superseded');
COMMENT ON TYPE build_state IS
    'State of a build: described (not queued yet), queued, running, then one final state. failed and timed_out are the build''s own fault, error is the machinery''s.';

CREATE TYPE attempt_state AS ENUM
    ('running', 'passed', 'failed', 'timed_out', 'cancelled', 'error', 'lost');
COMMENT ON TYPE attempt_state IS
    'State of one try at a build: error means the machinery failed (it could not start, or exit code 75), lost means its worker disappeared.';

CREATE FUNCTION build_state_is_final(state build_state) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN state IN ('passed', 'failed', 'timed_out', 'cancelled', 'error', 'skipped', 'superseded');
COMMENT ON FUNCTION build_state_is_final(build_state) IS 'True for the states that a build ends in.';

CREATE FUNCTION build_env_is_valid(env jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN jsonb_typeof(env) = 'object'
        AND NOT jsonb_path_exists(env, '$.keyvalue() ? (@.value.type() != "string" || !(@.key like_regex "^[A-Za-z_][A-Za-z0-9_]*$") || @.key starts with "BUILD_" || @.key starts with "PROP_")');
COMMENT ON FUNCTION build_env_is_valid(jsonb) IS
    'True for a JSON object of strings whose keys are names of environment variables other than BUILD_... and PROP_..., which buildreactor sets itself.';

CREATE TABLE builders (
    name            text PRIMARY KEY,
    number          integer GENERATED ALWAYS AS IDENTITY,
    description     text,
    executor        text     NOT NULL DEFAULT 'process',
    script          text,
    settings        jsonb    NOT NULL DEFAULT '{}',
    env             jsonb    NOT NULL DEFAULT '{}',
    labels          text[]   NOT NULL DEFAULT '{}',
    locks           text[]   NOT NULL DEFAULT '{}',
    max_running     integer  NOT NULL DEFAULT 1,
    timeout         interval NOT NULL DEFAULT '1 hour',
    silence_timeout interval          DEFAULT '20 minutes',
    max_attempts    integer  NOT NULL DEFAULT 3,
    retry_failed    integer  NOT NULL DEFAULT 0,
    keep_workspace  boolean  NOT NULL DEFAULT false,
    paused          boolean  NOT NULL DEFAULT false,
    paused_reason   text,
    CONSTRAINT builders_number_is_unique UNIQUE (number),
    CONSTRAINT builder_name_is_1_to_63_of_letters_digits_dot_underscore_minus
        CHECK (name ~ '^[A-Za-z0-9._-]{1,63}$' AND name !~ '^[.]+$'),
    CONSTRAINT executor_buildbot_is_not_supported_by_this_version CHECK (executor <> 'buildbot'),
    CONSTRAINT executor_is_process CHECK (executor IN ('process', 'buildbot')),
    CONSTRAINT process_builder_has_a_script CHECK (executor <> 'process' OR length(btrim(coalesce(script, ''), E' \t\r\n')) > 0),
    CONSTRAINT settings_are_a_json_object CHECK (jsonb_typeof(settings) = 'object'),
    CONSTRAINT process_builder_has_no_settings CHECK (executor <> 'process' OR settings = '{}'),
    CONSTRAINT env_is_a_json_object_of_strings_without_build_and_prop_names CHECK (build_env_is_valid(env)),
    CONSTRAINT labels_have_no_nulls_or_blanks CHECK (array_position(labels, NULL) IS NULL AND array_position(labels, '') IS NULL),
    CONSTRAINT locks_are_not_supported_by_this_version CHECK (locks = '{}'),
    CONSTRAINT max_running_is_1_to_1000 CHECK (max_running BETWEEN 1 AND 1000),
    CONSTRAINT timeout_is_1_second_to_30_days CHECK (timeout BETWEEN '1 second' AND '30 days'),
    CONSTRAINT silence_timeout_is_1_second_to_30_days CHECK (silence_timeout BETWEEN '1 second' AND '30 days'),
    CONSTRAINT max_attempts_is_1_to_100 CHECK (max_attempts BETWEEN 1 AND 100),
    CONSTRAINT retry_failed_is_0_to_100 CHECK (retry_failed BETWEEN 0 AND 100),
    CONSTRAINT paused_reason_goes_with_paused CHECK (paused OR paused_reason IS NULL)
);
COMMENT ON TABLE builders IS 'The named ways to build, one row each. Edit with plain SQL; a change takes effect at the next claim.';
COMMENT ON COLUMN builders.name IS 'Letters, digits, . _ - ; at most 63 bytes.';
COMMENT ON COLUMN builders.number IS 'Key of this builder''s slot locks in pg_locks (classid). Internal.';
COMMENT ON COLUMN builders.description IS 'For people.';
COMMENT ON COLUMN builders.executor IS 'What runs its attempts: process (a script on the worker).';
COMMENT ON COLUMN builders.script IS 'process: run by its #! line, or by /bin/sh -e when it has none.';
COMMENT ON COLUMN builders.settings IS 'The executor''s own settings; process has none.';
COMMENT ON COLUMN builders.env IS 'Extra environment variables, a JSON object of strings.';
COMMENT ON COLUMN builders.labels IS 'Only workers that offer all of these labels take its builds.';
COMMENT ON COLUMN builders.locks IS 'Names of exclusive resources; not supported by this version.';
COMMENT ON COLUMN builders.max_running IS 'How many of its builds run at once, over all workers.';
COMMENT ON COLUMN builders.timeout IS 'Limit for a whole attempt; past it the build is timed_out.';
COMMENT ON COLUMN builders.silence_timeout IS 'Limit for a time without output; null: none.';
COMMENT ON COLUMN builders.max_attempts IS 'Tries when the machinery fails: worker lost, script could not start, exit code 75.';
COMMENT ON COLUMN builders.retry_failed IS 'Extra tries when the build itself fails or times out.';
COMMENT ON COLUMN builders.keep_workspace IS 'Reuse the directory of the last build of this builder on the same worker and slot.';
COMMENT ON COLUMN builders.paused IS 'While true, no build of this builder is started.';
COMMENT ON COLUMN builders.paused_reason IS 'Why it is paused, for people.';

CREATE TABLE builds (
    id                  bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    builder             text        NOT NULL,
    properties          jsonb       NOT NULL DEFAULT '{}',
    reason              text,
    submitted_by        text        NOT NULL DEFAULT session_user,
    notify              text[]      NOT NULL DEFAULT '{}',
    state               build_state NOT NULL DEFAULT 'described',
    attempt             integer     NOT NULL DEFAULT 0,
    worker              text,
    queued_at           timestamptz,
    started_at          timestamptz,
    finished_at         timestamptz,
    exit_code           integer,
    term_signal         integer,
    detail              text,
    cancel_requested_at timestamptz,
    cancel_reason       text,
    superseded_by       bigint,
    needs               bigint[]    NOT NULL DEFAULT '{}',
    CONSTRAINT builder_of_a_build_exists FOREIGN KEY (builder) REFERENCES builders (name),
    CONSTRAINT properties_are_a_json_object CHECK (jsonb_typeof(properties) = 'object'),
    CONSTRAINT properties_are_at_most_1_mib CHECK (octet_length(properties::text) <= 1048576),
    CONSTRAINT notify_is_not_supported_by_this_version CHECK (notify = '{}'),
    CONSTRAINT needs_are_not_supported_by_this_version CHECK (needs = '{}'),
    CONSTRAINT cancel_is_not_supported_by_this_version CHECK (cancel_requested_at IS NULL AND cancel_reason IS NULL),
    CONSTRAINT superseded_by_is_not_supported_by_this_version CHECK (superseded_by IS NULL AND state <> 'superseded'),
    CONSTRAINT attempt_is_not_negative CHECK (attempt >= 0),
    CONSTRAINT a_described_build_is_not_queued CHECK ((state = 'described') = (queued_at IS NULL)),
    CONSTRAINT a_build_with_an_attempt_has_worker_and_start
        CHECK ((attempt > 0) = (started_at IS NOT NULL) AND (attempt > 0) = (worker IS NOT NULL)),
    CONSTRAINT a_running_build_has_an_attempt CHECK (state <> 'running' OR attempt > 0),
    CONSTRAINT a_final_build_has_a_finish CHECK (build_state_is_final(state) = (finished_at IS NOT NULL)),
    CONSTRAINT a_verdict_needs_an_attempt CHECK (state NOT IN ('passed', 'failed', 'timed_out') OR attempt > 0),
    CONSTRAINT only_an_ended_build_has_an_exit
        CHECK (state NOT IN ('described', 'running', 'skipped', 'superseded') OR (exit_code IS NULL AND term_signal IS NULL)),
    CONSTRAINT exit_code_or_signal_not_both CHECK (exit_code IS NULL OR term_signal IS NULL),
    CONSTRAINT a_passed_build_exits_0 CHECK (state <> 'passed' OR (coalesce(exit_code, 0) = 0 AND term_signal IS NULL))
    -- No order of the times is demanded: a clock that is set back must not stop a result from being recorded.
);
CREATE INDEX builds_finished ON builds (finished_at DESC) WHERE finished_at IS NOT NULL;
CREATE INDEX builds_finished_by_builder ON builds (builder, finished_at DESC) WHERE finished_at IS NOT NULL;
CREATE INDEX builds_running ON builds (id) WHERE state = 'running';
COMMENT ON TABLE builds IS 'The ledger: one row a build, kept. Columns of your own may be added; scripts see them in BUILD_FILE.';
COMMENT ON COLUMN builds.id IS 'Number of the build.';
COMMENT ON COLUMN builds.builder IS 'The builder that builds it.';
COMMENT ON COLUMN builds.properties IS 'What to build (revision, branch, ...): a JSON object; scripts see each as PROP_<NAME>.';
COMMENT ON COLUMN builds.reason IS 'Why it was asked for, for people.';
COMMENT ON COLUMN builds.submitted_by IS 'The database role that asked for it.';
COMMENT ON COLUMN builds.notify IS 'Mail addresses for this build alone; not supported by this version.';
COMMENT ON COLUMN builds.state IS 'described, queued, running, or final: passed, failed, timed_out, cancelled, error, skipped, superseded.';
COMMENT ON COLUMN builds.attempt IS 'Number of the current or last attempt; 0 before the first.';
COMMENT ON COLUMN builds.worker IS 'Worker of that attempt.';
COMMENT ON COLUMN builds.queued_at IS 'When it was (last) queued.';
COMMENT ON COLUMN builds.started_at IS 'When its last attempt started.';
COMMENT ON COLUMN builds.finished_at IS 'When it reached its final state.';
COMMENT ON COLUMN builds.exit_code IS 'Exit code of the script, where it exited.';
COMMENT ON COLUMN builds.term_signal IS 'Number of the signal that ended the script, where one did.';
COMMENT ON COLUMN builds.detail IS 'One line for a person: why it is in this state.';
COMMENT ON COLUMN builds.cancel_requested_at IS 'When somebody asked to cancel it; not supported by this version.';
COMMENT ON COLUMN builds.cancel_reason IS 'Why it was cancelled; not supported by this version.';
COMMENT ON COLUMN builds.superseded_by IS 'The newer build it was coalesced into; not supported by this version.';
COMMENT ON COLUMN builds.needs IS 'Builds that had to pass first; not supported by this version.';

CREATE TABLE build_queue (
    build_id     bigint PRIMARY KEY,
    builder      text        NOT NULL,
    priority     integer     NOT NULL DEFAULT 0,
    run_after    timestamptz,
    needs        bigint[]    NOT NULL DEFAULT '{}',
    coalesce_key text,
    properties   jsonb,
    reason       text,
    notify       text[],
    ready        boolean     NOT NULL DEFAULT true,
    queued_xid   xid8        NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT a_queued_build_is_described FOREIGN KEY (build_id) REFERENCES builds (id),
    CONSTRAINT run_after_is_a_finite_time CHECK (isfinite(run_after)),
    CONSTRAINT needs_are_not_supported_by_this_version CHECK (needs = '{}'),
    CONSTRAINT coalesce_key_is_not_supported_by_this_version CHECK (coalesce_key IS NULL),
    CONSTRAINT only_a_row_with_run_after_waits_for_it CHECK (ready OR run_after IS NOT NULL),
    CONSTRAINT properties_reason_and_notify_live_in_builds CHECK (properties IS NULL AND reason IS NULL AND notify IS NULL)
);
-- Waiting rows of one builder in the order in which they are claimed. Rows scheduled for later stay outside:
-- 25,000 of them at its head made a claim 28 times slower.
CREATE INDEX build_queue_ready ON build_queue (builder, priority DESC, build_id) WHERE ready;
CREATE INDEX build_queue_scheduled ON build_queue (run_after) WHERE NOT ready;
-- What became visible since an earlier snapshot, without walking dead rows: see sql/queries/look_new.sql.
CREATE INDEX build_queue_arrivals ON build_queue (queued_xid);
-- Rows come and go all day: let autovacuum look often, and by number rather than by share of the table.
ALTER TABLE build_queue SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.2);
COMMENT ON TABLE build_queue IS 'What waits or runs. INSERT a row to get a build. A row that can be locked waits; one that is locked runs; it is deleted by the transaction that records the final state.';
COMMENT ON COLUMN build_queue.build_id IS 'The build. Left out: the row describes a new build, and builds gets its row in the same statement.';
COMMENT ON COLUMN build_queue.builder IS 'The builder; taken from builds when build_id is given.';
COMMENT ON COLUMN build_queue.priority IS 'Higher first, then lower build_id.';
COMMENT ON COLUMN build_queue.run_after IS 'Not to be started before this time; null: at once.';
COMMENT ON COLUMN build_queue.needs IS 'Builds that must pass first; not supported by this version.';
COMMENT ON COLUMN build_queue.coalesce_key IS 'A waiting build of the same builder and key is superseded; not supported by this version.';
COMMENT ON COLUMN build_queue.properties IS 'For a new build: what to build. Moved to builds.properties by the INSERT.';
COMMENT ON COLUMN build_queue.reason IS 'For a new build: why. Moved to builds.reason by the INSERT.';
COMMENT ON COLUMN build_queue.notify IS 'For a new build: mail addresses. Moved to builds.notify by the INSERT.';
COMMENT ON COLUMN build_queue.ready IS 'False while run_after lies ahead; kept by buildreactor. Internal.';
COMMENT ON COLUMN build_queue.queued_xid IS 'Transaction that wrote the row last; tells workers what is new. Internal.';

CREATE TABLE build_attempts (
    build_id       bigint        NOT NULL,
    attempt        integer       NOT NULL,
    worker         text          NOT NULL,
    state          attempt_state NOT NULL DEFAULT 'running',
    started_at     timestamptz   NOT NULL,
    finished_at    timestamptz,
    exit_code      integer,
    term_signal    integer,
    detail         text,
    user_seconds   double precision,
    system_seconds double precision,
    max_rss_bytes  bigint,
    log_bytes      bigint,
    external_url   text,
    PRIMARY KEY (build_id, attempt),
    CONSTRAINT an_attempt_belongs_to_a_build FOREIGN KEY (build_id) REFERENCES builds (id) ON DELETE CASCADE,
    CONSTRAINT attempts_count_from_1 CHECK (attempt >= 1),
    CONSTRAINT a_running_attempt_has_no_finish CHECK ((state = 'running') = (finished_at IS NULL)),
    CONSTRAINT a_running_attempt_has_no_exit CHECK (state <> 'running' OR (exit_code IS NULL AND term_signal IS NULL)),
    CONSTRAINT exit_code_or_signal_not_both CHECK (exit_code IS NULL OR term_signal IS NULL),
    CONSTRAINT a_passed_attempt_exits_0 CHECK (state <> 'passed' OR (coalesce(exit_code, 0) = 0 AND term_signal IS NULL)),
    CONSTRAINT usage_is_not_negative CHECK (user_seconds >= 0 AND system_seconds >= 0 AND max_rss_bytes >= 0 AND log_bytes >= 0)
);
COMMENT ON TABLE build_attempts IS 'Every try at a build, kept.';
COMMENT ON COLUMN build_attempts.build_id IS 'The build.';
COMMENT ON COLUMN build_attempts.attempt IS 'Counts from 1 over the life of the build.';
COMMENT ON COLUMN build_attempts.worker IS 'The worker that ran it.';
COMMENT ON COLUMN build_attempts.state IS 'running, passed, failed, timed_out, cancelled, error (the machinery failed) or lost (its worker disappeared).';
COMMENT ON COLUMN build_attempts.started_at IS 'When it became visible, just before its first process.';
COMMENT ON COLUMN build_attempts.finished_at IS 'When its result was recorded.';
COMMENT ON COLUMN build_attempts.exit_code IS 'Exit code of the script, where it exited.';
COMMENT ON COLUMN build_attempts.term_signal IS 'Number of the signal that ended the script, where one did.';
COMMENT ON COLUMN build_attempts.detail IS 'One line for a person.';
COMMENT ON COLUMN build_attempts.user_seconds IS 'CPU seconds in user mode, all its processes.';
COMMENT ON COLUMN build_attempts.system_seconds IS 'CPU seconds in the kernel, all its processes.';
COMMENT ON COLUMN build_attempts.max_rss_bytes IS 'Largest resident set of any one of its processes, in bytes.';
COMMENT ON COLUMN build_attempts.log_bytes IS 'Bytes of output, also those left out of the log.';
COMMENT ON COLUMN build_attempts.external_url IS 'Where another system shows this attempt.';

CREATE TABLE build_log (
    build_id   bigint      NOT NULL,
    attempt    integer     NOT NULL,
    seq        bigint      NOT NULL,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    content    text        NOT NULL,
    PRIMARY KEY (build_id, attempt, seq),
    CONSTRAINT a_log_belongs_to_an_attempt FOREIGN KEY (build_id, attempt) REFERENCES build_attempts (build_id, attempt) ON DELETE CASCADE
);
COMMENT ON TABLE build_log IS 'Output of attempts in pieces, in order of seq; the beginning and the end of long ones. Read with build_log_text(id) or buildreactor log ID.';
COMMENT ON COLUMN build_log.build_id IS 'The build.';
COMMENT ON COLUMN build_log.attempt IS 'The attempt.';
COMMENT ON COLUMN build_log.seq IS 'Order of the pieces. A gap shows where output was left out.';
COMMENT ON COLUMN build_log.written_at IS 'When the piece was written here.';
COMMENT ON COLUMN build_log.content IS 'Text of the piece: not always whole lines; bytes that are not UTF-8 and NUL are replaced.';

CREATE TABLE workers (
    name       text PRIMARY KEY,
    host       text        NOT NULL,
    pid        integer     NOT NULL,
    version    text        NOT NULL,
    slots      integer     NOT NULL,
    labels     text[]      NOT NULL DEFAULT '{}',
    builders   text[]      NOT NULL DEFAULT '{*}',
    state      text        NOT NULL DEFAULT 'active',
    detail     text,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT worker_state_is_active_draining_or_stopped CHECK (state IN ('active', 'draining', 'stopped')),
    CONSTRAINT worker_has_slots CHECK (slots >= 1)
);
COMMENT ON TABLE workers IS 'The daemons that run builds, one row a worker name. Whether one is alive is told by its lock: see worker_status.';
COMMENT ON COLUMN workers.name IS 'Name of the worker ([worker] name).';
COMMENT ON COLUMN workers.host IS 'Machine it runs on.';
COMMENT ON COLUMN workers.pid IS 'Process id of its daemon there.';
COMMENT ON COLUMN workers.version IS 'Version of its daemon.';
COMMENT ON COLUMN workers.slots IS 'How many builds it runs at once.';
COMMENT ON COLUMN workers.labels IS 'Labels it offers.';
COMMENT ON COLUMN workers.builders IS 'Patterns of builder names that it takes.';
COMMENT ON COLUMN workers.state IS 'active, draining (finishes what runs, then leaves) or stopped.';
COMMENT ON COLUMN workers.detail IS 'One line for a person.';
COMMENT ON COLUMN workers.started_at IS 'When its daemon started.';
COMMENT ON COLUMN workers.seen_at IS 'When its daemon last looked at the queue.';

-- Builds on a Buildbot master.

CREATE FUNCTION buildbot_settings_are_valid(settings jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN jsonb_typeof(settings) = 'object'
        AND NOT jsonb_path_exists(settings, '$.keyvalue() ? (@.value.type() != "string" || @.value == "" || !(@.key == "master" || @.key == "scheduler" || @.key == "builder"))');
COMMENT ON FUNCTION buildbot_settings_are_valid(jsonb) IS
    'True for a JSON object with no other keys than master, scheduler and builder, each a text.';

ALTER TABLE builders
    DROP CONSTRAINT executor_buildbot_is_not_supported_by_this_version,
    DROP CONSTRAINT executor_is_process,
    ADD CONSTRAINT executor_is_process_or_buildbot CHECK (executor IN ('process', 'buildbot')),
    ADD CONSTRAINT buildbot_settings_are_texts_named_master_scheduler_builder
        CHECK (executor <> 'buildbot' OR buildbot_settings_are_valid(settings)),
    ADD CONSTRAINT buildbot_builder_has_no_script_env_or_keep_workspace
        CHECK (executor <> 'buildbot' OR (script IS NULL AND env = '{}' AND NOT keep_workspace));
COMMENT ON COLUMN builders.executor IS 'What runs its attempts: process (a script on the worker) or buildbot (a builder of a Buildbot master).';
COMMENT ON COLUMN builders.settings IS 'The executor''s own settings. buildbot: {"master": NAME as in [buildbot.NAME], may be left out where there is one; "scheduler": a force scheduler, default force; "builder": its name there, default the same}. process has none.';
COMMENT ON COLUMN builders.timeout IS 'Limit for a whole attempt, buildbot: its time in the master''s queue included; past it the build is timed_out.';

ALTER TABLE build_attempts ADD COLUMN external_worker text;
COMMENT ON COLUMN build_attempts.external_worker IS 'buildbot: the Buildbot worker that builds it.';
COMMENT ON COLUMN build_attempts.external_url IS 'Where another system shows this attempt. buildbot: its page on the master.';

CREATE TABLE build_steps (
    build_id    bigint  NOT NULL,
    attempt     integer NOT NULL,
    position    integer NOT NULL,
    name        text    NOT NULL,
    state       text    NOT NULL,
    started_at  timestamptz,
    finished_at timestamptz,
    detail      text,
    PRIMARY KEY (build_id, attempt, position),
    CONSTRAINT a_step_belongs_to_an_attempt FOREIGN KEY (build_id, attempt) REFERENCES build_attempts (build_id, attempt) ON DELETE CASCADE,
    CONSTRAINT step_state_is_running_passed_warnings_failed_skipped_error_lost_or_cancelled
        CHECK (state IN ('running', 'passed', 'warnings', 'failed', 'skipped', 'error', 'lost', 'cancelled'))
);
COMMENT ON TABLE build_steps IS 'Steps of attempts, where their executor tells of them: buildbot does, while they run.';
COMMENT ON COLUMN build_steps.build_id IS 'The build.';
COMMENT ON COLUMN build_steps.attempt IS 'The attempt.';
COMMENT ON COLUMN build_steps.position IS 'Order of the steps, from 1; those of a build that Buildbot repeats follow the first''s.';
COMMENT ON COLUMN build_steps.name IS 'Name of the step.';
COMMENT ON COLUMN build_steps.state IS 'running, passed, warnings, failed, skipped, error (an exception in the master), lost (Buildbot repeats it elsewhere) or cancelled. The last known one, where the attempt ended first.';
COMMENT ON COLUMN build_steps.started_at IS 'By the master''s clock, whole seconds.';
COMMENT ON COLUMN build_steps.finished_at IS 'By the master''s clock, whole seconds.';
COMMENT ON COLUMN build_steps.detail IS 'One line for a person, in Buildbot''s words.';

ALTER TABLE workers ADD COLUMN unready jsonb NOT NULL DEFAULT '{}';
ALTER TABLE workers ADD CONSTRAINT unready_is_a_json_object CHECK (jsonb_typeof(unready) = 'object');
COMMENT ON COLUMN workers.unready IS 'Builders whose builds it could not start when it last tried, each with the reason: their Buildbot master does not answer, for example.';

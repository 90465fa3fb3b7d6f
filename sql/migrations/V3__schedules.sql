-- Builds by the clock.

CREATE TABLE build_schedules (
    name          text PRIMARY KEY,
    builder       text    NOT NULL,
    cron          text    NOT NULL,
    time_zone     text    NOT NULL DEFAULT 'UTC',
    properties    jsonb   NOT NULL DEFAULT '{}',
    enabled       boolean NOT NULL DEFAULT true,
    next_at       timestamptz,
    last_at       timestamptz,
    last_build_id bigint,
    detail        text,
    CONSTRAINT schedule_name_is_1_to_63_of_letters_digits_dot_underscore_minus
        CHECK (name ~ '^[A-Za-z0-9._-]{1,63}$' AND name !~ '^[.]+$'),
    CONSTRAINT builder_of_a_schedule_exists FOREIGN KEY (builder) REFERENCES builders (name),
    CONSTRAINT properties_are_a_json_object CHECK (jsonb_typeof(properties) = 'object'),
    CONSTRAINT properties_are_at_most_1_mib CHECK (octet_length(properties::text) <= 1048576),
    CONSTRAINT cron_is_at_most_200_bytes CHECK (octet_length(cron) <= 200),
    CONSTRAINT next_at_is_a_finite_time CHECK (isfinite(next_at)),
    CONSTRAINT a_disabled_schedule_has_no_next_at CHECK (enabled OR next_at IS NULL),
    CONSTRAINT last_at_goes_with_last_build_id CHECK ((last_at IS NULL) = (last_build_id IS NULL))
);
-- What a daemon asks for at each look: rows not planned yet come first.
CREATE INDEX build_schedules_next ON build_schedules (next_at NULLS FIRST) WHERE enabled;
COMMENT ON TABLE build_schedules IS 'Builds by the clock, one row a schedule. INSERT, UPDATE, DELETE as you like; a change takes effect at once. Each tick queues one build, however many daemons run; ticks missed while none ran are made up for by one build.';
COMMENT ON COLUMN build_schedules.name IS 'Letters, digits, . _ - ; at most 63 bytes. Builds have the reason "schedule NAME".';
COMMENT ON COLUMN build_schedules.builder IS 'The builder that builds it. While it is paused, builds are queued and wait.';
COMMENT ON COLUMN build_schedules.cron IS 'Minute, hour, day of month, month, day of week, as in crontab(5): 30 2 * * MON-FRI. When clocks go forward, a fixed time that does not exist that day (one minute, one hour) comes right after the gap, and repeated ones (*, lists, ranges, steps) in the gap are left out; when clocks go back, a fixed time comes once, the first time, and repeated ones come in both hours.';
COMMENT ON COLUMN build_schedules.time_zone IS 'Whose clock cron means: a name of pg_timezone_names, such as Europe/Berlin.';
COMMENT ON COLUMN build_schedules.properties IS 'What to build: builds.properties of each of its builds.';
COMMENT ON COLUMN build_schedules.enabled IS 'False: queues nothing. Daemons set it to false when cron has no meaning for them; then detail says why.';
COMMENT ON COLUMN build_schedules.next_at IS 'When the next build is queued; null: to be worked out by a daemon, at once when one runs. Set it to clock_timestamp() for a build now.';
COMMENT ON COLUMN build_schedules.last_at IS 'When its last build was queued.';
COMMENT ON COLUMN build_schedules.last_build_id IS 'That build.';
COMMENT ON COLUMN build_schedules.detail IS 'One line for a person: why daemons have disabled it.';

-- Who queued a build last, and how long the texts may be that people write.

-- builders before builds, as an INSERT INTO build_queue locks them: the other way round the two would wait for each other.
UPDATE builders SET description = left(description, 10000) WHERE octet_length(description) > 65536;
UPDATE builders SET paused_reason = left(paused_reason, 10000) WHERE octet_length(paused_reason) > 65536;
ALTER TABLE builders
    ADD CONSTRAINT description_paused_reason_and_settings_are_at_most_64_kib_each
        CHECK (octet_length(description) <= 65536 AND octet_length(paused_reason) <= 65536 AND octet_length(settings::text) <= 65536) NOT VALID,
    ADD CONSTRAINT labels_and_locks_are_at_most_100_names_and_20000_bytes_each
        CHECK (cardinality(labels) <= 100 AND cardinality(locks) <= 100
               AND octet_length(array_to_string(labels, ',')) <= 20000 AND octet_length(array_to_string(locks, ',')) <= 20000) NOT VALID;

ALTER TABLE builds ADD COLUMN IF NOT EXISTS queued_by text;
COMMENT ON COLUMN builds.queued_by IS 'The database role that queued it last. Null: before this version, or not queued yet.';

-- Builds that have ended keep what they say: going through all of them would take long. One that is queued again is checked then.
UPDATE builds SET reason = left(reason, 10000) WHERE state IN ('described', 'queued', 'running') AND octet_length(reason) > 65536;
UPDATE builds SET cancel_reason = left(cancel_reason, 10000) WHERE state IN ('described', 'queued', 'running') AND octet_length(cancel_reason) > 65536;
ALTER TABLE builds
    ADD CONSTRAINT reason_cancel_reason_and_detail_are_at_most_64_kib_each
        CHECK (octet_length(reason) <= 65536 AND octet_length(cancel_reason) <= 65536 AND octet_length(detail) <= 65536) NOT VALID,
    ADD CONSTRAINT needs_are_at_most_100000 CHECK (cardinality(needs) <= 100000) NOT VALID;

-- A request to cancel a build that runs. A row of its own, because whoever asks may leave his transaction open: an UPDATE of builds would keep
-- the result of that build from being recorded. No key but its own: two who ask for the same do not wait for each other.
CREATE TABLE build_cancels (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    build_id     bigint      NOT NULL,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason       text,
    CONSTRAINT a_cancel_is_about_a_build FOREIGN KEY (build_id) REFERENCES builds (id) ON DELETE CASCADE
);
CREATE INDEX build_cancels_of ON build_cancels (build_id);
COMMENT ON TABLE build_cancels IS 'Requests to cancel builds whose row a worker holds: the next worker that looks moves them to builds.cancel_requested_at. Internal.';
COMMENT ON COLUMN build_cancels.id IS 'Order of the requests.';
COMMENT ON COLUMN build_cancels.build_id IS 'The build.';
COMMENT ON COLUMN build_cancels.requested_at IS 'When somebody asked.';
COMMENT ON COLUMN build_cancels.reason IS 'Why.';

-- Needs, coalescing, cancelling, draining: the queue that people expect.

ALTER TABLE builds
    DROP CONSTRAINT needs_are_not_supported_by_this_version,
    DROP CONSTRAINT cancel_is_not_supported_by_this_version,
    DROP CONSTRAINT superseded_by_is_not_supported_by_this_version,
    ADD CONSTRAINT a_cancel_reason_goes_with_a_request CHECK (cancel_requested_at IS NOT NULL OR cancel_reason IS NULL),
    ADD CONSTRAINT a_superseded_build_names_the_newer_one CHECK ((state = 'superseded') = (superseded_by IS NOT NULL)),
    ADD CONSTRAINT needs_name_builds CHECK (array_position(needs, NULL) IS NULL);
CREATE INDEX builds_to_cancel ON builds (worker) WHERE cancel_requested_at IS NOT NULL AND state IN ('queued', 'running');
COMMENT ON COLUMN builds.cancel_requested_at IS 'When somebody asked to cancel it: cancel_build(id, reason).';
COMMENT ON COLUMN builds.cancel_reason IS 'Why it was cancelled.';
COMMENT ON COLUMN builds.superseded_by IS 'The newer build of the same builder and coalesce_key that took its place.';
COMMENT ON COLUMN builds.needs IS 'Builds that had to pass first.';

ALTER TABLE build_queue
    DROP CONSTRAINT needs_are_not_supported_by_this_version,
    DROP CONSTRAINT coalesce_key_is_not_supported_by_this_version,
    DROP CONSTRAINT only_a_row_with_run_after_waits_for_it,
    ADD CONSTRAINT a_row_waits_for_needs_or_run_after CHECK (CASE WHEN ready THEN needs = '{}' ELSE needs <> '{}' OR run_after IS NOT NULL END),
    ADD CONSTRAINT needs_name_builds CHECK (array_position(needs, NULL) IS NULL);
CREATE INDEX build_queue_needs ON build_queue USING gin (needs) WHERE needs <> '{}';
CREATE INDEX build_queue_needy ON build_queue (build_id) WHERE needs <> '{}';
CREATE INDEX build_queue_coalesce ON build_queue (builder, coalesce_key, build_id) WHERE coalesce_key IS NOT NULL;
COMMENT ON COLUMN build_queue.needs IS 'Builds that must pass first; those that have passed are taken out. builds.needs keeps them all.';
COMMENT ON COLUMN build_queue.coalesce_key IS 'A waiting, not yet running build of the same builder and key is superseded by this one.';

ALTER TABLE build_attempts ADD COLUMN slot integer;
COMMENT ON COLUMN build_attempts.slot IS 'Which of the builder''s slots it uses, from 1; no other running build of the builder has the same.';

ALTER TABLE workers ADD COLUMN drain_requested boolean NOT NULL DEFAULT false;
ALTER TABLE workers ADD COLUMN accepting boolean NOT NULL DEFAULT true;
COMMENT ON COLUMN workers.drain_requested IS 'drain_worker(name) was called; its daemon finishes what runs and leaves.';
COMMENT ON COLUMN workers.accepting IS 'False while it claims nothing for a reason of its own, such as a full disk: see detail.';

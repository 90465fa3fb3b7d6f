-- The lease chain: claims that are taken again, and logs that the next daemon goes on with.

ALTER TABLE build_attempts ADD COLUMN claims integer NOT NULL DEFAULT 1;
COMMENT ON COLUMN build_attempts.claims IS 'How often its worker took its claim: once, and again after each lost connection or restart.';

ALTER TABLE build_attempts ADD COLUMN folder text;
COMMENT ON COLUMN build_attempts.folder IS 'Id of the worker''s folder that it runs in: who owns that folder may take it over. Internal.';

ALTER TABLE workers ADD COLUMN folder text;
COMMENT ON COLUMN workers.folder IS 'Id of its folder. Internal.';

-- Which attempt used a slot last: the newest entry of this index, found without walking others. An index of what runs would be full of dead
-- entries behind a long claim.
ALTER TABLE build_attempts ADD COLUMN builder text;
UPDATE build_attempts a SET builder = b.builder FROM builds b WHERE b.id = a.build_id AND a.slot IS NOT NULL;
CREATE INDEX build_attempts_slot ON build_attempts (builder, slot, started_at);
COMMENT ON COLUMN build_attempts.builder IS 'Of the build. Null in attempts of old versions.';

ALTER TABLE build_log
    ADD COLUMN position bigint,
    ADD COLUMN left_out bigint;
COMMENT ON COLUMN build_log.position IS 'Bytes of output up to the end of this piece.';
COMMENT ON COLUMN build_log.left_out IS 'Bytes of output that this piece, a marker, stands for; null: it is output.';

-- What older programs need to know about this schema.

CREATE OR REPLACE FUNCTION build_schema_requires() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 7;
COMMENT ON FUNCTION build_schema_requires() IS 'A program that knows migrations up to this number, or further, can work with this schema.';

COMMENT ON TABLE build_schema_history IS 'Migrations that were applied. Internal.';
COMMENT ON COLUMN build_schema_history.version IS 'Number of the migration.';
COMMENT ON COLUMN build_schema_history.name IS 'Its name.';
COMMENT ON COLUMN build_schema_history.applied_on IS 'When it was applied.';
COMMENT ON COLUMN build_schema_history.checksum IS 'Checksum of its text.';

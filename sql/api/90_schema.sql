-- What older programs need to know about this schema.

CREATE OR REPLACE FUNCTION farm.build_schema_requires() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 13;
COMMENT ON FUNCTION farm.build_schema_requires() IS 'A program that knows migrations up to this number, or further, can work with this schema.';

COMMENT ON TABLE farm.build_schema_history IS 'Migrations that were applied. Internal.';
COMMENT ON COLUMN farm.build_schema_history.version IS 'Number of the migration.';
COMMENT ON COLUMN farm.build_schema_history.name IS 'Its name.';
COMMENT ON COLUMN farm.build_schema_history.applied_on IS 'When it was applied.';
COMMENT ON COLUMN farm.build_schema_history.checksum IS 'Checksum of its text.';

-- Triggers and sequences, each by what is said of the function or the column that it belongs to.
DO $$
DECLARE
    object record;
    ours oid := (SELECT t.typnamespace FROM pg_type t WHERE t.oid = pg_typeof(NULL::farm.builds));
BEGIN
    FOR object IN
        SELECT format('COMMENT ON TRIGGER %I ON %s IS %L', t.tgname, c.oid::regclass, obj_description(t.tgfoid, 'pg_proc')) AS statement
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE NOT t.tgisinternal AND c.relnamespace = ours AND p.pronamespace = c.relnamespace
          AND obj_description(t.tgfoid, 'pg_proc') LIKE 'Trigger: %'
        UNION ALL
        SELECT format('COMMENT ON SEQUENCE %s IS %L', s.oid::regclass, format('Numbers for %s.%s.', c.relname, a.attname))
        FROM pg_class s JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype = 'i'
        JOIN pg_class c ON d.refclassid = 'pg_class'::regclass AND c.oid = d.refobjid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
        WHERE s.relkind = 'S' AND s.relnamespace = ours
          AND c.relname IN ('build_cancels', 'builds', 'builders', 'build_mail', 'build_subscriptions', 'build_locks', 'build_schedules', 'build_attempts', 'build_log', 'build_queue', 'workers')
    LOOP
        EXECUTE object.statement;
    END LOOP;
END $$;

-- Workers of a program that does not know of build_attempts.lease, beside others that do (V13). Such a daemon goes on after the migration:
-- what it runs ends as always, and its next start is refused (build_schema_requires). Until then nobody could tell how long its builds
-- live, and it cannot tell how long those of others do. So it begins nothing, and gives nothing of theirs up as lost.
-- A session of a daemon that knows of leases says so; a person's is none of a daemon.

CREATE OR REPLACE FUNCTION farm.build_attempts_of_old_programs() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    RAISE EXCEPTION '%', CASE TG_OP
        WHEN 'INSERT' THEN format('worker "%s" starts nothing more: its program is older than the tables', NEW.worker)
        ELSE format('build %s.%s is left to newer workers: a program older than the tables does not know how long its processes live', OLD.build_id, OLD.attempt)
    END USING
        ERRCODE = 'feature_not_supported',
        HINT = 'Install the program that migrated the tables, and restart this worker. What it runs goes on meanwhile.';
END $$;
COMMENT ON FUNCTION farm.build_attempts_of_old_programs() IS 'Trigger: a daemon older than build_attempts.lease begins nothing, and gives up nobody''s build that has one.';

CREATE OR REPLACE TRIGGER a_begin BEFORE INSERT ON farm.build_attempts FOR EACH ROW
    WHEN (NEW.state = 'running' AND NEW.lease IS NULL AND current_setting('buildreactor.session', true) = 'daemon')
    EXECUTE FUNCTION farm.build_attempts_of_old_programs();
CREATE OR REPLACE TRIGGER a_lost BEFORE UPDATE OF state ON farm.build_attempts FOR EACH ROW
    WHEN (NEW.state = 'lost' AND OLD.lease IS NOT NULL AND current_setting('buildreactor.session', true) = 'daemon'
          AND current_setting('buildreactor.leases', true) IS DISTINCT FROM 'known')
    EXECUTE FUNCTION farm.build_attempts_of_old_programs();

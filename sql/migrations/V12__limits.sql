-- Limits on what becomes the environment and the script of a build, checked when a row is written: past them the kernel does not start a
-- program (execve(2)). By triggers rather than CHECKs, because a CHECK also refuses every later UPDATE of a row that is older than it, and
-- a build of such a row could neither start nor end.

CREATE OR REPLACE FUNCTION builder_fits() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    -- The kernel's limit for a variable with its name, the = and a NUL.
    one   CONSTANT integer := 131072;
    -- With as much for properties and the rest it fits into the 2 MiB that the kernel takes where the stack may have 8 MiB.
    every CONSTANT integer := 1048576;
    name  text;
    size  bigint;
BEGIN
    IF octet_length(NEW.script) > 4194304 THEN
        RAISE EXCEPTION 'the script of builder % has % bytes, the limit is 4 MiB', left(NEW.name, 63), octet_length(NEW.script) USING
            ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, CONSTRAINT = 'script_has_at_most_4_mib',
            HINT = 'Keep it in a repository or a file on the workers, and let a short script fetch and run it.';
    END IF;
    -- That it is an object of strings is a CHECK's business.
    IF jsonb_typeof(NEW.env) = 'object' THEN
        SELECT e.key, octet_length(e.key) + octet_length(e.value) + 2 INTO name, size
        FROM jsonb_each_text(NEW.env) AS e ORDER BY 2 DESC NULLS LAST, 1 LIMIT 1;
        IF size > one THEN
            RAISE EXCEPTION 'variable % in env of builder % has % bytes with its name, the limit is 128 KiB', left(name, 60), left(NEW.name, 63), size USING
                ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, CONSTRAINT = 'a_variable_in_env_has_at_most_128_kib_with_its_name',
                HINT = 'The kernel starts no program with a larger one. Put it into a file, and the path of the file into env.';
        END IF;
        SELECT sum(octet_length(e.key) + octet_length(e.value) + 2) INTO size FROM jsonb_each_text(NEW.env) AS e;
        IF size > every THEN
            RAISE EXCEPTION 'env of builder % has % bytes, the limit is 1 MiB', left(NEW.name, 63), size USING
                ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, CONSTRAINT = 'env_has_at_most_1_mib',
                HINT = 'The kernel starts no program with much more than that. Put it into files, and their paths into env.';
        END IF;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION builder_fits() IS 'Trigger: refuses a script over 4 MiB, a variable in env over 128 KiB with its name, and env over 1 MiB.';

CREATE OR REPLACE TRIGGER fits BEFORE INSERT OR UPDATE OF script, env ON builders
    FOR EACH ROW EXECUTE FUNCTION builder_fits();
COMMENT ON TRIGGER fits ON builders IS 'Limits of script and env.';

CREATE OR REPLACE FUNCTION properties_fit() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    many    bigint;
    longest integer;
BEGIN
    -- That they are an object is a CHECK's business.
    IF NEW.properties = '{}' OR jsonb_typeof(NEW.properties) <> 'object' THEN
        RETURN NEW;
    END IF;
    -- Properties of a row that is older than the limits may stay.
    IF TG_OP = 'UPDATE' AND NEW.properties = OLD.properties THEN
        RETURN NEW;
    END IF;
    SELECT count(*), max(octet_length(k)) INTO many, longest FROM jsonb_object_keys(NEW.properties) AS k;
    IF longest > 200 THEN
        RAISE EXCEPTION 'the name of a property has % bytes, the limit is 200', longest USING
            ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, CONSTRAINT = 'a_property_has_a_name_of_at_most_200_bytes',
            DETAIL = 'It begins with ' || (SELECT left(k, 60) FROM jsonb_object_keys(NEW.properties) AS k ORDER BY octet_length(k) DESC LIMIT 1),
            HINT = 'Put what is long into the value.';
    END IF;
    IF many > 10000 THEN
        RAISE EXCEPTION 'there are % properties, the limit is 10000', many USING
            ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, CONSTRAINT = 'there_are_at_most_10000_properties',
            HINT = 'One property may be a list, or an object with many more inside.';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION properties_fit() IS 'Trigger: refuses properties with names over 200 bytes, and more than 10000 of them.';

CREATE OR REPLACE TRIGGER properties_fit BEFORE INSERT OR UPDATE OF properties ON builds
    FOR EACH ROW EXECUTE FUNCTION properties_fit();
COMMENT ON TRIGGER properties_fit ON builds IS 'Limits of properties.';
CREATE OR REPLACE TRIGGER properties_fit BEFORE INSERT OR UPDATE OF properties ON build_schedules
    FOR EACH ROW EXECUTE FUNCTION properties_fit();
COMMENT ON TRIGGER properties_fit ON build_schedules IS 'Limits of properties.';

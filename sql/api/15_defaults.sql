-- What a person leaves open, says as NULL (object mappers, foreign tables), or numbers himself (history from elsewhere).
--
-- The triggers come first on their tables (a_absent before a_change, a_insert, ...), and only for rows that need them.

CREATE OR REPLACE FUNCTION farm.build_absent() RETURNS trigger
    -- SECURITY DEFINER: the numbers of a table belong to its owner.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    given jsonb := '{}';
    absent record;
    filled jsonb;
BEGIN
    FOR absent IN
        SELECT a.attname AS name,
               CASE WHEN a.attidentity <> ''
                    THEN format('nextval(%L)', pg_get_serial_sequence(format('%I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME), a.attname))
                    ELSE pg_get_expr(d.adbin, d.adrelid) END AS usual
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = TG_RELID AND a.attnotnull AND NOT a.attisdropped AND a.attnum > 0 AND a.attgenerated = ''
          AND (d.oid IS NOT NULL OR a.attidentity <> '')
          -- Named by the trigger: what an UPDATE cannot take back.
          AND (TG_OP = 'INSERT' OR a.attname <> ALL (coalesce(TG_ARGV, '{}')))
    LOOP
        EXECUTE format('SELECT CASE WHEN ($1).%I IS NULL THEN to_jsonb(%s) END', absent.name, absent.usual) INTO filled USING NEW;
        IF filled IS NOT NULL THEN
            given := given || jsonb_build_object(absent.name, filled);
        END IF;
    END LOOP;
    RETURN jsonb_populate_record(NEW, given);
END $$;
COMMENT ON FUNCTION farm.build_absent() IS 'Trigger: NULL in a column that cannot be null means its default.';

CREATE OR REPLACE FUNCTION farm.build_numbered() RETURNS trigger
    -- SECURITY DEFINER: the sequence belongs to the owner.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    given bigint;
    most bigint := TG_ARGV[1];
    numbers regclass;
BEGIN
    IF TG_ARGV[0] = 'number' THEN
        given := NEW.number;
    ELSE
        given := NEW.id;
    END IF;
    IF given > most THEN
        RAISE EXCEPTION '% of % is %, and can be % at most', TG_ARGV[0], TG_TABLE_NAME, given, most USING
            ERRCODE = 'check_violation', HINT = 'Rows that bring no number are numbered on from the highest.';
    END IF;
    numbers := pg_get_serial_sequence(format('%I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME), TG_ARGV[0]);
    -- As a rule the sequence gave the number.
    IF given <= coalesce(pg_sequence_last_value(numbers), 0) THEN
        RETURN NEW;
    END IF;
    -- Moved on at once, whatever becomes of this transaction, and never back: one at a time, under a lock that is held for this expression
    -- alone. Its key is the sequence's own, in a class of ours ('bnum').
    FOR tried IN 1..100 LOOP
        IF (CASE WHEN pg_try_advisory_lock(1651406189, numbers::oid::integer)
                THEN CASE WHEN setval(numbers, greatest(given, pg_sequence_last_value(numbers))) IS NOT NULL
                          THEN pg_advisory_unlock(1651406189, numbers::oid::integer) END
                ELSE false END)
        THEN
            RETURN NEW;
        END IF;
        PERFORM pg_sleep(0.01);
    END LOOP;
    RAISE EXCEPTION 'another session keeps the numbers of % locked', TG_TABLE_NAME USING
        ERRCODE = 'lock_not_available', HINT = 'SELECT pid FROM pg_locks WHERE locktype = ''advisory'' AND classid = 1651406189; says which.';
END $$;
COMMENT ON FUNCTION farm.build_numbered() IS 'Trigger: a row that brings its own number, from another database or by hand, moves the sequence on, so that the next rows do not meet it.';

CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.builders FOR EACH ROW
    WHEN (NEW.number IS NULL OR NEW.executor IS NULL OR NEW.settings IS NULL OR NEW.env IS NULL OR NEW.labels IS NULL OR NEW.locks IS NULL
          OR NEW.max_running IS NULL OR NEW.timeout IS NULL OR NEW.max_attempts IS NULL OR NEW.retry_failed IS NULL
          OR NEW.keep_workspace IS NULL OR NEW.paused IS NULL)
    EXECUTE FUNCTION farm.build_absent('number');
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.builds FOR EACH ROW
    WHEN (NEW.id IS NULL OR NEW.properties IS NULL OR NEW.submitted_by IS NULL OR NEW.notify IS NULL OR NEW.state IS NULL
          OR NEW.attempt IS NULL OR NEW.needs IS NULL)
    EXECUTE FUNCTION farm.build_absent('id', 'submitted_by', 'state', 'attempt');
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.build_queue FOR EACH ROW
    WHEN (NEW.priority IS NULL OR NEW.needs IS NULL OR NEW.ready IS NULL OR NEW.queued_xid IS NULL)
    EXECUTE FUNCTION farm.build_absent();
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.build_schedules FOR EACH ROW
    WHEN (NEW.time_zone IS NULL OR NEW.properties IS NULL OR NEW.enabled IS NULL) EXECUTE FUNCTION farm.build_absent();
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.build_subscriptions FOR EACH ROW
    WHEN (NEW.id IS NULL OR NEW.events IS NULL) EXECUTE FUNCTION farm.build_absent('id');
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT OR UPDATE ON farm.build_locks FOR EACH ROW
    WHEN (NEW.number IS NULL OR NEW.capacity IS NULL) EXECUTE FUNCTION farm.build_absent('number');
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT ON farm.build_attempts FOR EACH ROW
    WHEN (NEW.state IS NULL OR NEW.lock_units IS NULL OR NEW.claims IS NULL) EXECUTE FUNCTION farm.build_absent();
CREATE OR REPLACE TRIGGER a_absent BEFORE INSERT ON farm.build_log FOR EACH ROW
    WHEN (NEW.written_at IS NULL) EXECUTE FUNCTION farm.build_absent();

-- After a_absent, by name. 2^53 is the last whole number that every reader of JSON has.
CREATE OR REPLACE TRIGGER a_number BEFORE INSERT OR UPDATE OF id ON farm.builds FOR EACH ROW EXECUTE FUNCTION farm.build_numbered('id', '9007199254740991');
CREATE OR REPLACE TRIGGER a_number BEFORE INSERT OR UPDATE OF id ON farm.build_mail FOR EACH ROW EXECUTE FUNCTION farm.build_numbered('id', '9007199254740991');
CREATE OR REPLACE TRIGGER a_number BEFORE INSERT OR UPDATE OF id ON farm.build_subscriptions FOR EACH ROW EXECUTE FUNCTION farm.build_numbered('id', '9007199254740991');
CREATE OR REPLACE TRIGGER a_number BEFORE INSERT OR UPDATE OF number ON farm.builders FOR EACH ROW EXECUTE FUNCTION farm.build_numbered('number', '1000000000');
CREATE OR REPLACE TRIGGER a_number BEFORE INSERT OR UPDATE OF number ON farm.build_locks FOR EACH ROW EXECUTE FUNCTION farm.build_numbered('number', '1000000000');

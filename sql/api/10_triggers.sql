-- What an INSERT, UPDATE or DELETE by a person means. Re-created at each migrate that changes it.
--
-- SECURITY DEFINER: a role that may only INSERT INTO build_queue needs no rights on builds.
-- SET search_path FROM CURRENT: migrate sets it to the schema of these tables, then pg_temp.
-- The daemon's sessions set buildreactor.session = 'daemon': what it writes is not a wake, because a notifying
-- COMMIT takes a lock on the whole cluster until it is flushed, and results must not queue up behind each other.

CREATE OR REPLACE FUNCTION build_queue_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    known text;
    build builds;
BEGIN
    NEW.queued_xid := pg_current_xact_id();
    NEW.ready := NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp();

    IF NEW.build_id IS NULL THEN
        IF NEW.builder IS NULL THEN
            RAISE EXCEPTION 'a row in build_queue needs a builder or a build_id' USING
                ERRCODE = 'not_null_violation',
                HINT = 'INSERT INTO build_queue (builder) VALUES (''NAME'');  or, for a row of builds:  INSERT INTO build_queue (build_id) VALUES (ID);';
        END IF;
        IF NOT EXISTS (SELECT FROM builders WHERE name = NEW.builder) THEN
            SELECT string_agg(name, ', ' ORDER BY name) INTO known FROM (SELECT name FROM builders ORDER BY name LIMIT 20) b;
            RAISE EXCEPTION 'there is no builder "%"', NEW.builder USING
                ERRCODE = 'foreign_key_violation',
                HINT = coalesce('There is: ' || known || '. ', '') || 'A new one: INSERT INTO builders (name, script) VALUES (''NAME'', ''SCRIPT'');';
        END IF;
        IF jsonb_typeof(NEW.properties) <> 'object' THEN
            RAISE EXCEPTION 'properties must be a JSON object, not %', jsonb_typeof(NEW.properties) USING
                ERRCODE = 'check_violation', HINT = 'For example ''{"revision": "1a2b3c"}''.';
        END IF;
        INSERT INTO builds (builder, properties, reason, notify, state, queued_at)
        VALUES (NEW.builder, coalesce(NEW.properties, '{}'), NEW.reason, coalesce(NEW.notify, '{}'), 'queued', clock_timestamp())
        RETURNING id INTO NEW.build_id;
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
        RETURN NEW;
    END IF;

    SELECT * INTO build FROM builds WHERE id = NEW.build_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no build %', NEW.build_id USING
            ERRCODE = 'foreign_key_violation',
            HINT = 'Leave build_id out to describe a new build here, or INSERT INTO builds (builder) VALUES (''NAME'') RETURNING id first.';
    END IF;
    IF NEW.builder IS DISTINCT FROM build.builder AND NEW.builder IS NOT NULL THEN
        RAISE EXCEPTION 'build % is of builder "%", not "%"', build.id, build.builder, NEW.builder USING
            ERRCODE = 'check_violation', HINT = 'Leave builder out when build_id is given.';
    END IF;
    IF NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL THEN
        RAISE EXCEPTION 'build % has its properties, reason and notify in builds already', build.id USING
            ERRCODE = 'check_violation', HINT = 'UPDATE builds SET ... WHERE id = ' || build.id || '; then queue it without them.';
    END IF;
    NEW.builder := build.builder;
    -- Queued or running already: the primary key refuses the row, so that ON CONFLICT DO NOTHING works too.
    IF build.state NOT IN ('queued', 'running') THEN
        UPDATE builds
        SET state = 'queued', queued_at = clock_timestamp(), finished_at = NULL, exit_code = NULL, term_signal = NULL, detail = NULL
        WHERE id = build.id;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION build_queue_insert() IS 'Trigger: a row without build_id gets its row in builds; one with build_id queues that build (again).';

CREATE OR REPLACE FUNCTION build_queue_update() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF NEW.build_id <> OLD.build_id OR NEW.builder <> OLD.builder THEN
        RAISE EXCEPTION 'the builder of queued build % cannot be changed', OLD.build_id USING
            ERRCODE = 'check_violation',
            HINT = 'DELETE FROM build_queue WHERE build_id = ' || OLD.build_id || '; then INSERT it anew.';
    END IF;
    IF NEW.properties IS NOT NULL OR NEW.reason IS NOT NULL OR NEW.notify IS NOT NULL THEN
        UPDATE builds
        SET properties = coalesce(NEW.properties, properties), reason = coalesce(NEW.reason, reason), notify = coalesce(NEW.notify, notify)
        WHERE id = NEW.build_id;
        NEW.properties := NULL;
        NEW.reason := NULL;
        NEW.notify := NULL;
    END IF;
    NEW.queued_xid := pg_current_xact_id();
    NEW.ready := NEW.run_after IS NULL OR NEW.run_after <= clock_timestamp();
    RETURN NEW;
END $$;
COMMENT ON FUNCTION build_queue_update() IS 'Trigger: keeps ready and queued_xid; passes properties, reason and notify on to builds.';

CREATE OR REPLACE FUNCTION build_queue_delete() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE builds
    SET state = 'cancelled', finished_at = clock_timestamp(), detail = format('deleted from build_queue by %s', session_user)
    WHERE id = OLD.build_id AND state IN ('queued', 'running');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION build_queue_delete() IS 'Trigger: deleting a waiting row cancels its build.';

CREATE OR REPLACE FUNCTION build_queue_truncate() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    RAISE EXCEPTION 'TRUNCATE would leave builds queued without a row' USING
        ERRCODE = 'object_not_in_prerequisite_state', HINT = 'DELETE FROM build_queue; cancels what waits.';
END $$;
COMMENT ON FUNCTION build_queue_truncate() IS 'Trigger: refuses TRUNCATE of build_queue.';

CREATE OR REPLACE FUNCTION build_queue_wake() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM pg_notify('build_queue', '');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION build_queue_wake() IS 'Trigger: NOTIFY build_queue, once a statement.';

CREATE OR REPLACE FUNCTION builders_changed() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM pg_notify('build_control', 'builders');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION builders_changed() IS 'Trigger: NOTIFY build_control, so that a change of a builder takes effect at once.';

CREATE OR REPLACE FUNCTION builds_insert() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    -- The queue's own trigger inserts queued builds; it stands one level above this one.
    IF NEW.state IN ('queued', 'running') AND pg_trigger_depth() < 2 THEN
        RAISE EXCEPTION 'a new row of builds cannot be %', NEW.state USING
            ERRCODE = 'check_violation',
            HINT = 'INSERT INTO builds (builder) VALUES (''NAME'') RETURNING id; describes a build, INSERT INTO build_queue (build_id) VALUES (ID); queues it.';
    END IF;
    IF NOT EXISTS (SELECT FROM builders WHERE name = NEW.builder) THEN
        RAISE EXCEPTION 'there is no builder "%"', NEW.builder USING
            ERRCODE = 'foreign_key_violation',
            HINT = 'SELECT name FROM builders; shows what there is. A new one: INSERT INTO builders (name, script) VALUES (''NAME'', ''SCRIPT'');';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION builds_insert() IS 'Trigger: a build is inserted as described, or, for history from elsewhere, in a final state.';

CREATE OR REPLACE FUNCTION builds_delete() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    -- Checked here, before the foreign key would wait for the running build's claim.
    IF OLD.state IN ('queued', 'running') THEN
        RAISE EXCEPTION 'build % is %', OLD.id, OLD.state USING
            ERRCODE = 'object_in_use', HINT = 'Only a build that is not in build_queue can be deleted.';
    END IF;
    RETURN OLD;
END $$;
COMMENT ON FUNCTION builds_delete() IS 'Trigger: refuses to delete a build that waits or runs.';

CREATE OR REPLACE TRIGGER a_insert BEFORE INSERT ON build_queue FOR EACH ROW EXECUTE FUNCTION build_queue_insert();
CREATE OR REPLACE TRIGGER a_update BEFORE UPDATE ON build_queue FOR EACH ROW EXECUTE FUNCTION build_queue_update();
CREATE OR REPLACE TRIGGER a_delete AFTER DELETE ON build_queue FOR EACH ROW
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION build_queue_delete();
CREATE OR REPLACE TRIGGER a_truncate BEFORE TRUNCATE ON build_queue FOR EACH STATEMENT EXECUTE FUNCTION build_queue_truncate();
CREATE OR REPLACE TRIGGER build_queue_wake AFTER INSERT OR UPDATE ON build_queue FOR EACH STATEMENT
    WHEN (current_setting('buildreactor.session', true) IS DISTINCT FROM 'daemon') EXECUTE FUNCTION build_queue_wake();
CREATE OR REPLACE TRIGGER builders_changed AFTER INSERT OR UPDATE OR DELETE ON builders FOR EACH STATEMENT EXECUTE FUNCTION builders_changed();
CREATE OR REPLACE TRIGGER a_insert BEFORE INSERT ON builds FOR EACH ROW EXECUTE FUNCTION builds_insert();
CREATE OR REPLACE TRIGGER a_delete BEFORE DELETE ON builds FOR EACH ROW EXECUTE FUNCTION builds_delete();

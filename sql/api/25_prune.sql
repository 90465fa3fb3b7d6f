-- Deleting builds that have ended, but none that something of people's own holds.

CREATE OR REPLACE FUNCTION farm.build_prune(ids bigint[], OUT deleted bigint, OUT kept jsonb)
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    ours oid := (SELECT c.relnamespace FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid WHERE t.oid = pg_typeof(NULL::farm.builds));
    reference record;
    held bigint[];
    free bigint[] := ids;
    deferred text;
    -- Parts of free that are still to be deleted: from, to.
    froms integer[];
    tos integer[];
    low integer;
    high integer;
    gone bigint;
    holder text;
    state text;
    other_schema text;
BEGIN
    deleted := 0;
    kept := '{}';
    -- Tables of people's own that refer to builds, or to what goes with them, and do not let them go.
    FOR reference IN
        SELECT CASE WHEN r.relnamespace = ours THEN quote_ident(r.relname) ELSE r.oid::regclass::text END AS name,
               format('SELECT array_agg(DISTINCT t.%1$I) FROM %2$s t WHERE t.%1$I = ANY ($1) AND EXISTS (SELECT FROM %3$s r WHERE %4$s)',
                      CASE t.relname WHEN 'builds' THEN 'id' ELSE 'build_id' END, t.oid::regclass, r.oid::regclass,
                      (SELECT string_agg(format('t.%I OPERATOR(%I.%s) r.%I', k.attname, n.nspname, o.oprname, f.attname), ' AND ')
                       FROM unnest(c.confkey, c.conkey, c.conpfeqop) AS x(pk, fk, op)
                       JOIN pg_attribute k ON k.attrelid = c.confrelid AND k.attnum = x.pk JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = x.fk
                       JOIN pg_operator o ON o.oid = x.op JOIN pg_namespace n ON n.oid = o.oprnamespace)) AS sql
        FROM pg_constraint c JOIN pg_class t ON t.oid = c.confrelid JOIN pg_class r ON r.oid = c.conrelid
        WHERE c.contype = 'f' AND c.confdeltype IN ('a', 'r') AND c.conparentid = 0
          AND t.relnamespace = ours AND t.relname IN ('builds', 'build_attempts', 'build_log', 'build_steps', 'build_mail')
          AND NOT (r.relnamespace = ours AND r.relname = 'build_queue')
          -- What may not be read is found out by trying, below.
          AND has_table_privilege(r.oid, 'SELECT') AND has_schema_privilege(r.relnamespace, 'USAGE') AND NOT r.relrowsecurity
        ORDER BY 1
    LOOP
        EXECUTE reference.sql INTO held USING ids;
        IF held IS NOT NULL THEN
            holder := 'table ' || reference.name || ' refers to them';
            kept := kept || jsonb_build_object(holder, coalesce((kept ->> holder)::bigint, 0) + cardinality(held));
            free := ARRAY(SELECT i FROM unnest(free) AS i WHERE i <> ALL (held));
        END IF;
    END LOOP;
    -- Checked at once, not at the COMMIT, where one build would keep all the others.
    SELECT string_agg(DISTINCT format('%I.%I', n.nspname, c.conname), ', ') INTO deferred
    FROM pg_constraint c JOIN pg_class t ON t.oid = c.confrelid JOIN pg_namespace n ON n.oid = c.connamespace
    WHERE c.contype = 'f' AND c.condeferred AND t.relnamespace = ours AND t.relname IN ('builds', 'build_attempts', 'build_log', 'build_steps', 'build_mail');
    IF free <> '{}' THEN
        froms := ARRAY[1];
        tos := ARRAY[cardinality(free)];
    END IF;
    WHILE cardinality(froms) > 0 LOOP
        low := froms[cardinality(froms)];
        high := tos[cardinality(tos)];
        froms := trim_array(froms, 1);
        tos := trim_array(tos, 1);
        BEGIN
            DELETE FROM farm.builds b WHERE b.id = ANY (free[low:high]);
            GET DIAGNOSTICS gone = ROW_COUNT;
            IF deferred IS NOT NULL THEN
                EXECUTE 'SET CONSTRAINTS ' || deferred || ' IMMEDIATE';
                EXECUTE 'SET CONSTRAINTS ' || deferred || ' DEFERRED';
            END IF;
            deleted := deleted + gone;
            IF gone <= high - low THEN
                holder := 'a trigger keeps them';
                kept := kept || jsonb_build_object(holder, coalesce((kept ->> holder)::bigint, 0) + high - low + 1 - gone);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, holder = TABLE_NAME, other_schema = SCHEMA_NAME;
            -- Of the moment (locks, deadlocks, room), of the role or of the code of a trigger, not of the build.
            IF left(state, 2) IN ('25', '40', '42', '53', '54', '55', '57', '58', 'XX') THEN
                RAISE;
            END IF;
            IF low = high THEN
                holder := CASE WHEN state = '23503' AND holder <> ''
                               THEN 'table ' || CASE WHEN other_schema = (SELECT n.nspname FROM pg_namespace n WHERE n.oid = ours) THEN '' ELSE quote_ident(other_schema) || '.' END
                                    || quote_ident(holder) || ' refers to them'
                               ELSE left(SQLERRM, 200) END;
                kept := kept || jsonb_build_object(holder, coalesce((kept ->> holder)::bigint, 0) + 1);
            ELSE
                froms := froms || ARRAY[(low + high) / 2 + 1, low];
                tos := tos || ARRAY[high, (low + high) / 2];
            END IF;
        END;
    END LOOP;
END $$;
COMMENT ON FUNCTION farm.build_prune(bigint[]) IS 'Deletes these builds, which have ended and which the caller has locked, with attempts and logs. What something holds stays: kept says what it is, and how many builds each.';
REVOKE EXECUTE ON FUNCTION farm.build_prune(bigint[]) FROM PUBLIC;

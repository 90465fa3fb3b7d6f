//! The statements of [`super::examine`]. They only read and take no row locks. Times are seconds.

/// Which PostgreSQL. Works with any version.
pub(super) const VERSION: &str = "SELECT current_setting('server_version_num')::integer / 10000 AS major, current_setting('server_version') AS version";

/// How we are connected, and to what. `others`: tables that are not ours.
pub(super) const CONNECTION: &str = "
    SELECT current_user::text AS role, current_database()::text AS dbname,
           pg_is_in_recovery() AS standby, current_setting('transaction_read_only') = 'on' AS read_only,
           current_setting('server_encoding') AS encoding,
           (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid() AND s.ssl) AS tls,
           inet_client_addr() IS NULL AS socket,
           coalesce(inet_client_addr() = inet_server_addr() OR inet_client_addr() << '127.0.0.0/8', false) AS same_machine,
           (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^(pg_|information_schema$)'
              AND (c.relnamespace = (SELECT o.relnamespace FROM pg_class o WHERE o.oid = to_regclass('build_queue'))
                   AND c.relname ~ '^(build_.*|builds|builders|workers)$') IS NOT TRUE) AS others";

/// The current schema, and others that have tables of ours.
pub(super) const SCHEMA: &str = "
    SELECT current_schema()::text AS schema,
           (SELECT string_agg(quote_ident(n.nspname), ', ') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relname = 'build_queue' AND c.relkind = 'r' AND n.nspname IS DISTINCT FROM current_schema()) AS elsewhere";

/// $1 boolean: whether builds are to be deleted. What the statements of `sql/queries` need; triggers and foreign keys work with their owner's rights.
pub(super) const PRIVILEGES: &str = "
    WITH lacking AS (
        SELECT format('%I.%I', n.nspname, c.relname) AS object, array_to_string(ARRAY(
            SELECT p FROM unnest(string_to_array(w.wanted, ', ')) AS p WHERE NOT has_table_privilege(c.oid, p)), ', ') AS missing
        FROM (VALUES ('build_schema_history', 'SELECT'), ('builders', 'SELECT'), ('build_locks', 'SELECT'), ('builds', 'SELECT, UPDATE' || CASE WHEN $1 THEN ', DELETE' ELSE '' END),
                     ('build_queue', 'SELECT, INSERT, UPDATE, DELETE'), ('build_schedules', 'SELECT, UPDATE'), ('build_mail', 'SELECT, UPDATE'), ('build_attempts', 'SELECT, INSERT, UPDATE'), ('build_steps', 'SELECT, INSERT, UPDATE'),
                     ('build_log', 'SELECT, INSERT, UPDATE, DELETE'), ('workers', 'SELECT, INSERT, UPDATE'), ('build_advisory_locks', 'SELECT')) AS w (name, wanted)
        JOIN pg_class c ON c.oid = to_regclass(w.name) JOIN pg_namespace n ON n.oid = c.relnamespace
        UNION ALL
        SELECT 'FUNCTION ' || f::text, 'EXECUTE'
        FROM unnest(ARRAY[to_regprocedure('pg_notify(text, text)'), to_regprocedure('build_state_is_final(build_state)'), to_regprocedure('mail_addresses_are_valid(text[])'),
                          to_regprocedure('build_schema_api()'), to_regprocedure('build_schema_requires()'),
                          to_regprocedure('build_needs_settle(bigint)'), to_regprocedure('build_queue_supersede(text, text, bigint)'), to_regprocedure('build_cancel_settle(bigint)')]) AS f
        WHERE f IS NOT NULL AND NOT has_function_privilege(f, 'EXECUTE')
    )
    SELECT current_user::text AS role, object, missing, format('GRANT %s ON %s TO %I;', missing, object, current_user) AS remedy
    FROM lacking WHERE missing <> ''";

/// The triggers of all tables in the schema of ours.
pub(super) const TRIGGERS: &str = "
    SELECT c.relname::text AS relation, t.tgname::text AS name, t.tgenabled::text AS enabled
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE c.relnamespace = (SELECT o.relnamespace FROM pg_class o WHERE o.oid = to_regclass('build_queue'))";

/// $1 text[]: the Buildbot masters that this worker knows. $2 text: its name. Builders that ask for others, or for none where there is not
/// exactly one; and whether there are other workers.
pub(super) const MASTERS: &str = "
    SELECT settings ->> 'master' AS master, string_agg('`' || name || '`', ', ' ORDER BY name) AS builders,
           EXISTS (SELECT FROM workers w WHERE w.name <> $2 AND w.state <> 'stopped') AS others
    FROM builders
    WHERE executor = 'buildbot' AND CASE WHEN settings ? 'master' THEN NOT settings ->> 'master' = ANY ($1) ELSE cardinality($1) <> 1 END
    GROUP BY 1 ORDER BY 1";

/// $1 text[]: the Buildbot masters that this worker knows. $2 text[]: its labels. Builders that it may build for there.
pub(super) const ON_MASTERS: &str = "
    SELECT name, settings::text AS settings, coalesce(settings ->> 'master', $1[1]) AS master FROM builders
    WHERE executor = 'buildbot' AND labels <@ $2 AND CASE WHEN settings ? 'master' THEN settings ->> 'master' = ANY ($1) ELSE cardinality($1) = 1 END
    ORDER BY name";

/// $1 text: this worker. Who uses its name, by the lock that a living daemon holds, and the slots of all others.
pub(super) const WORKERS: &str = "
    SELECT ARRAY(SELECT slots FROM workers WHERE name <> $1 AND state <> 'stopped') AS slots,
           (SELECT CASE WHEN l.ours THEN coalesce('process ' || w.pid || ' on ' || w.host, 'backend ' || l.pid) ELSE l.holder || ', which is no worker' END
            FROM build_advisory_locks l LEFT JOIN workers w ON w.name = $1
            WHERE l.kind = 'name' AND l.part = hashtext($1) ORDER BY l.ours DESC LIMIT 1) AS holder";

/// Limits on connections, each with how many sessions that are not ours count towards it now.
pub(super) const CONNECTIONS: &str = "
    WITH others AS MATERIALIZED (
        SELECT datname, usename FROM pg_stat_activity
        WHERE coalesce(backend_type, 'client backend') = 'client backend' AND datname IS NOT NULL
          AND application_name NOT LIKE 'buildreactor%'
    )
    SELECT format('the server has %s for ordinary roles', v.room) AS what, v.room, (SELECT count(*) FROM others) AS used,
           'raise max_connections' AS remedy
    FROM (SELECT current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
                 - coalesce(current_setting('reserved_connections', true), '0')::bigint AS room) v
    UNION ALL
    SELECT format('database `%s` allows %s', datname, datconnlimit), datconnlimit::bigint,
           (SELECT count(*) FROM others o WHERE o.datname = d.datname), format('ALTER DATABASE %I CONNECTION LIMIT -1', datname)
    FROM pg_database d WHERE datname = current_database() AND datconnlimit >= 0
    UNION ALL
    SELECT format('role `%s` allows %s', rolname, rolconnlimit), rolconnlimit::bigint,
           (SELECT count(*) FROM others o WHERE o.usename = r.rolname), format('ALTER ROLE %I CONNECTION LIMIT -1', rolname)
    FROM pg_roles r WHERE rolname = session_user AND rolconnlimit >= 0 AND NOT rolsuper";

/// What may end a session. `source`: where the value comes from.
pub(super) const TIMEOUTS: &str = "
    SELECT name, setting::float8 / 1000 AS seconds, source FROM pg_settings
    WHERE name IN ('idle_in_transaction_session_timeout', 'idle_session_timeout', 'statement_timeout', 'transaction_timeout')
    ORDER BY name";

/// What may lose a result that was committed.
pub(super) const NOT_DURABLE: &str = "
    SELECT name, source FROM pg_settings
    WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting = 'off' ORDER BY name";

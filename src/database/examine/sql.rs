//! The statements of [`super::examine`]. They only read and take no row locks. Times are seconds. They want the search_path of our sessions.

/// Which PostgreSQL. Works with any version.
pub(super) const VERSION: &str = "SELECT current_setting('server_version_num')::integer / 10000 AS major, current_setting('server_version') AS version";

/// $1 text: the schema. How we are connected, and to what. `others`: tables that are not ours.
pub(super) const CONNECTION: &str = "
    SELECT current_database()::text AS dbname, pg_is_in_recovery() AS standby, (SELECT s.source FROM pg_settings s WHERE s.name = 'default_transaction_read_only' AND s.setting = 'on') AS read_only,
           current_setting('server_encoding') AS encoding,
           (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid() AND s.ssl) AS tls,
           inet_client_addr() IS NULL AS socket,
           coalesce(inet_client_addr() = inet_server_addr() OR inet_client_addr() << '127.0.0.0/8', false) AS same_machine,
           (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^(pg_|information_schema$)'
              AND NOT (n.nspname = $1 AND c.relname ~ '^(build_.*|builds|builders|workers)$'
                       AND EXISTS (SELECT FROM pg_class o WHERE o.relnamespace = n.oid AND o.relname = 'build_queue'))) AS others";

/// $1 text: the schema. Others that have tables of ours.
pub(super) const ELSEWHERE: &str = "
    SELECT string_agg(quote_ident(n.nspname), ', ') AS elsewhere FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname = 'build_queue' AND c.relkind = 'r' AND n.nspname <> $1";

/// $1 text: the schema. $2 boolean: whether builds are to be deleted. What the statements of `sql/queries` need. Triggers and foreign keys work
/// with their owner's rights; CHECKs and the conditions of triggers with ours, and what they call is immutable.
pub(super) const PRIVILEGES: &str = "
    WITH home AS (
        SELECT n.oid, n.nspname FROM pg_namespace n WHERE n.nspname = $1
    ), lacking AS (
        SELECT format('%I.%I', h.nspname, c.relname) AS object, array_to_string(ARRAY(
            SELECT p FROM unnest(string_to_array(w.wanted, ', ')) AS p WHERE NOT has_table_privilege(c.oid, p)), ', ') AS missing
        FROM (VALUES ('build_schema_history', 'SELECT'), ('build_advisory_locks', 'SELECT'), ('build_cancels', 'SELECT, UPDATE, DELETE'), ('builders', 'SELECT'), ('build_locks', 'SELECT'), ('builds', 'SELECT, UPDATE' || CASE WHEN $2 THEN ', DELETE' ELSE '' END),
                     ('build_queue', 'SELECT, INSERT, UPDATE, DELETE'), ('build_schedules', 'SELECT, UPDATE'), ('build_mail', 'SELECT, UPDATE'), ('build_attempts', 'SELECT, INSERT, UPDATE'), ('build_steps', 'SELECT, INSERT, UPDATE'),
                     ('build_log', 'SELECT, INSERT, UPDATE, DELETE'), ('workers', 'SELECT, INSERT, UPDATE')) AS w (name, wanted)
        CROSS JOIN home h JOIN pg_class c ON c.relname = w.name AND c.relnamespace = h.oid
        UNION ALL
        SELECT 'FUNCTION ' || p.oid::regprocedure, 'EXECUTE'
        FROM pg_proc p CROSS JOIN home h
        WHERE NOT has_function_privilege(p.oid, 'EXECUTE')
          AND (p.oid = 'pg_notify(text, text)'::regprocedure
               OR (p.pronamespace = h.oid
                   AND (p.provolatile = 'i' OR p.proname IN ('build_needs_settle', 'build_needs_follow', 'build_settle_some', 'build_holder', 'build_session', 'build_queue_supersede', 'build_cancel_settle')
                        OR (p.proname = 'build_prune' AND $2))))
    )
    SELECT current_user::text AS role, object, missing, format('GRANT %s ON %s TO %I;', missing, object, current_user) AS remedy
    FROM lacking WHERE missing <> ''";

/// $1 text: the schema. The triggers of all its tables.
pub(super) const TRIGGERS: &str = "
    SELECT c.relname::text AS relation, t.tgname::text AS name, t.tgenabled::text AS enabled
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE c.relnamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = $1)";

/// $1 text[]: the Buildbot masters that this worker knows. $2 text: its name. Builders that ask for others, or for none where there is not
/// exactly one; and whether there are other workers.
pub(super) const MASTERS: &str = "
    SELECT settings ->> 'master' AS master, string_agg('`' || name || '`', ', ' ORDER BY name) AS builders,
           EXISTS (SELECT FROM farm.workers w WHERE w.name <> $2 AND w.state <> 'stopped') AS others
    FROM farm.builders
    WHERE executor = 'buildbot' AND CASE WHEN settings ? 'master' THEN NOT settings ->> 'master' = ANY ($1) ELSE cardinality($1) <> 1 END
    GROUP BY 1 ORDER BY 1";

/// $1 text[]: the Buildbot masters that this worker knows. $2 text[]: its labels. Builders that it may build for there.
pub(super) const ON_MASTERS: &str = "
    SELECT name, settings::text AS settings, coalesce(settings ->> 'master', $1[1]) AS master FROM farm.builders
    WHERE executor = 'buildbot' AND labels <@ $2 AND CASE WHEN settings ? 'master' THEN settings ->> 'master' = ANY ($1) ELSE cardinality($1) = 1 END
    ORDER BY name";

/// $1 text: this worker. Who uses its name, by the lock that a living daemon holds, and the slots of all others.
pub(super) const WORKERS: &str = "
    SELECT ARRAY(SELECT slots FROM farm.workers WHERE name <> $1 AND state <> 'stopped') AS slots,
           (SELECT CASE WHEN l.ours THEN coalesce('process ' || w.pid || ' on ' || w.host, 'backend ' || l.pid) ELSE l.holder || ', which is no worker' END
            FROM farm.build_advisory_locks l LEFT JOIN farm.workers w ON w.name = $1
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

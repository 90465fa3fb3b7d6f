//! What every session of ours is set to, whatever the role, the database or the connection string say. The one place for it.

use std::time::Duration;

use tokio_postgres::{Client, Error};

use super::schema::Schema;

/// Settings that a role or a database may have changed (`ALTER ROLE ... SET`), and that change what a statement means, what it finds, or
/// whether it works: back to what PostgreSQL comes with. `gin_fuzzy_search_limit` lets a search by index leave rows out. `DateStyle` and
/// those after it decide how a value becomes text, which scripts find in `BUILD_FILE`. A setting that this server does not know is left out.
const NEUTRAL: &str = "SELECT pg_catalog.set_config(s.name, s.boot_val, false) FROM pg_catalog.pg_settings s \
    WHERE s.name = ANY ('{standard_conforming_strings,backslash_quote,transform_null_equals,array_nulls,gin_fuzzy_search_limit,exit_on_error,\
    row_security,restrict_nonsystem_relation_kind,quote_all_identifiers,check_function_bodies,default_tablespace,default_table_access_method,\
    default_transaction_isolation,default_transaction_deferrable,xmloption,DateStyle,IntervalStyle,bytea_output,extra_float_digits}') \
    AND s.setting <> s.boot_val; \
    SELECT pg_catalog.set_config('session_replication_role', 'origin', false) FROM pg_catalog.pg_settings s \
    WHERE s.name = 'session_replication_role' AND s.setting <> 'origin' AND pg_catalog.current_setting('is_superuser') = 'on'; \
    SET plpgsql.variable_conflict = error; SET plpgsql.extra_errors = none; SET plpgsql.extra_warnings = none; \
    SET client_min_messages = warning";

/// Of all sessions that write. The keepalives are the server's side: the session of a dead daemon ends after some 11 s, and with it the
/// lock on the worker's name. `buildreactor.session` tells the triggers that this is no person. `enable_seqscan`: behind a long claim the
/// queue is mostly dead rows and its statistics mean little, so a sequential scan would read them all. `jit`: with such estimates
/// PostgreSQL would spend longer on compiling a short statement than on running it. `synchronous_commit`: an attempt that a crash of the
/// server had forgotten would run twice.
const WRITING: &str = "SET buildreactor.session = 'daemon'; SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; \
    SET tcp_keepalives_count = 3; SET tcp_user_timeout = 10000; SET enable_seqscan = off; SET jit = off; \
    SET default_transaction_read_only = off; \
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('transaction_timeout', 'idle_session_timeout'); \
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';";

/// Settings of a session that runs short statements.
pub(super) fn work() -> String {
    format!(
        "{NEUTRAL}; {WRITING} SET statement_timeout = '30s'; SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '60s'"
    )
}

/// Settings of a session that holds a claim; the server ends it after `idle` without a ping.
pub(super) fn claim(idle: Duration) -> String {
    let idle = idle.as_millis();
    format!(
        "{NEUTRAL}; {WRITING} SET statement_timeout = 0; SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = {idle}"
    )
}

/// Settings of the session that migrates: no statement of it has a deadline but the waits for locks, which `migrate` sets.
pub(super) fn migrate() -> String {
    format!(
        "{NEUTRAL}; {WRITING} SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0"
    )
}

/// Settings of a session that only reads, for `watch` and `log`. It is a person's session like psql: it does not set
/// `buildreactor.session`. `jit`: the views look costly to the planner, and compiling them takes longer than running them.
pub(super) fn reading() -> String {
    format!(
        "{NEUTRAL}; SET default_transaction_read_only = on; SET statement_timeout = '28s'; SET lock_timeout = 0; \
         SET idle_in_transaction_session_timeout = '60s'; SET jit = off"
    )
}

/// Gives a new session its settings and the search_path of ours, and finds the schema when nobody has.
///
/// # Errors
/// The session should be given up.
pub(super) async fn prepare(client: &Client, schema: &Schema, settings: &str) -> Result<(), Error> {
    schema.enter(client).await?;
    client.batch_execute(settings).await
}

//! What every session of ours is set to, whatever the role, the database or the connection string say. The one place for it.

use std::time::Duration;

use tokio_postgres::{Client, Error};

use super::schema::Schema;

/// Of all sessions that write. The keepalives are the server's side: the session of a dead daemon ends after some 11 s, and with it the
/// lock on the worker's name. `buildreactor.session` tells the triggers that this is no person. `enable_seqscan`: behind a long claim the
/// queue is mostly dead rows and its statistics mean little, so a sequential scan would read them all. `jit`: with such estimates
/// PostgreSQL would spend longer on compiling a short statement than on running it. `synchronous_commit`: an attempt that a crash of the
/// server had forgotten would run twice.
const WRITING: &str = "SET buildreactor.session = 'daemon'; SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; \
    SET tcp_keepalives_count = 3; SET tcp_user_timeout = 10000; SET enable_seqscan = off; SET jit = off; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('transaction_timeout', 'idle_session_timeout'); \
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';";

/// Settings of a session that runs short statements.
pub(super) fn work() -> String {
    format!(
        "{WRITING} SET statement_timeout = '30s'; SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '60s'"
    )
}

/// Settings of a session that holds a claim; the server ends it after `idle` without a ping.
pub(super) fn claim(idle: Duration) -> String {
    let idle = idle.as_millis();
    format!(
        "{WRITING} SET statement_timeout = 0; SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = {idle}"
    )
}

/// Settings of a session that only reads, for `watch` and `log`. It is a person's session like psql: it does not set
/// `buildreactor.session`. `jit`: the views look costly to the planner, and compiling them takes longer than running them.
pub(super) fn reading() -> String {
    "SET default_transaction_read_only = on; SET statement_timeout = '28s'; \
     SET idle_in_transaction_session_timeout = '60s'; SET jit = off"
        .to_owned()
}

/// Gives a new session its settings and the search_path of ours, and finds the schema when nobody has.
///
/// # Errors
/// The session should be given up.
pub(super) async fn prepare(client: &Client, schema: &Schema, settings: &str) -> Result<(), Error> {
    schema.enter(client).await?;
    client.batch_execute(settings).await
}

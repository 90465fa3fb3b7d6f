//! The only room that names `tokio_postgres` or `deadpool_postgres`: connections, pools, the listener, migrations, and one
//! function per file in `sql/queries`.
//!
//! Four kinds of sessions, each of its own: **watch** (one: the worker's name lock, the looks at the queue), **listen** (one: LISTEN),
//! **claim** (one for each running build: the transaction that holds the queue row) and **work** (a few, for everything short).

mod charset;
pub mod claim;
pub mod conninfo;
mod error;
pub mod examine;
mod keys;
pub mod mail;
pub mod migrate;
pub mod queries;
pub mod reading;
pub mod retention;
pub mod schedules;
mod schema;
mod session;
mod tls;
pub mod trust;
pub mod watch;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};

pub use self::claim::{Claim, Tried};
pub use self::conninfo::ConnInfo;
pub use self::error::DatabaseError;
use self::schema::Schema;
pub use self::watch::{News, Watch};

/// Result of a step in the database.
pub type Result<T> = std::result::Result<T, DatabaseError>;

/// How long a short statement may take before the connection counts as dead. Fixed: well above a loaded server's answer,
/// well below the lease.
pub const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Work connections on top of one for each slot: the start of an attempt and its log do not wait for each other's turn long.
pub const WORK_CONNECTIONS: u32 = 3;

/// Says to the trigger `a_lost` that this program waits for the lease of an attempt before it gives it up as lost.
const KNOWS_LEASES: &str = "SET buildreactor.leases = 'known'";

/// The databases' connections of one daemon or command.
#[derive(Clone)]
pub struct Database {
    info: ConnInfo,
    schema: Schema,
    work: Pool,
    claims: Pool,
    charset: Arc<charset::Charset>,
}

/// Numbers that the claim sessions need.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// How many claims may be open at once.
    pub slots: u32,
    /// After this long without a ping the server ends a claim's session and frees its row (the server's own dead man's
    /// switch, `idle_in_transaction_session_timeout`; it works for a stopped client and a silent network alike).
    pub claim_idle: Duration,
}

impl Database {
    /// Prepares pools; connects to nothing yet.
    ///
    /// # Errors
    /// The connection string's TLS files cannot be used.
    pub fn new(info: ConnInfo, limits: SessionLimits, application_name: &str) -> Result<Database> {
        let schema = Schema::default();
        let pool = |size, settings, kind| pool(&info, &schema, size, settings, &format!("{application_name} {kind}"));
        let work = pool(limits.slots + WORK_CONNECTIONS, session::work(), "work")?;
        let claims = format!("{}; {KNOWS_LEASES}", session::claim(limits.claim_idle));
        let claims = pool(limits.slots + 1, claims, "claim")?;
        Ok(Database { info, schema, work, claims, charset: Arc::default() })
    }

    /// Connections that this many slots need at most: watch and listen, claims, work.
    pub fn budget(slots: u32) -> u32 {
        2 + (slots + 1) + (slots + WORK_CONNECTIONS)
    }

    /// Lets this many claims be open at once, if that is more than the slots: a worker may have left more builds than it has slots now.
    pub fn room_for_claims(&self, claims: usize) {
        if claims + 1 > self.claims.status().max_size {
            self.claims.resize(claims + 1);
        }
    }

    /// Where it is, for messages.
    pub fn info(&self) -> &ConnInfo {
        &self.info
    }

    async fn work(&self) -> Result<Object> {
        self.take_from(&self.work).await
    }

    async fn claim_session(&self) -> Result<Object> {
        self.take_from(&self.claims).await
    }

    async fn take_from(&self, pool: &Pool) -> Result<Object> {
        // deadpool's own limits leave out what is done to a connection after connecting.
        const LIMIT: Duration = Duration::from_secs(3 * ANSWER_TIME.as_secs());
        tokio::time::timeout(LIMIT, pool.get())
            .await
            .map_err(|_| DatabaseError::NoAnswer { step: "get a connection", after: LIMIT })?
            .map_err(|source| DatabaseError::pool(&self.info, source))
    }
}

fn pool(info: &ConnInfo, schema: &Schema, size: u32, settings: String, application_name: &str) -> Result<Pool> {
    let config = client_config(info, application_name);
    let manager = Manager::from_config(config, info.tls()?, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    let schema = schema.clone();
    let prepare = Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
        let (schema, settings) = (schema.clone(), settings.clone());
        Box::pin(async move { session::prepare(client, &schema, &settings).await.map_err(HookError::Backend) })
    });
    Pool::builder(manager)
        .max_size(size as usize)
        .timeouts(Timeouts { wait: Some(ANSWER_TIME), create: Some(ANSWER_TIME), recycle: Some(ANSWER_TIME) })
        .runtime(Runtime::Tokio1)
        .post_create(prepare)
        .build()
        .map_err(|error| DatabaseError::Unexpected { step: "set up a connection pool", what: error.to_string() })
}

/// The person's connection settings, with ours where they left them open: a dead peer is noticed within some 10 s
/// (keepalives 5/2/3, `tcp_user_timeout` 10 s: a keepalive alone notices nothing while a request is unanswered).
fn client_config(info: &ConnInfo, application_name: &str) -> tokio_postgres::Config {
    let mut config = info.config();
    if config.get_application_name().is_none() {
        config.application_name(application_name);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(ANSWER_TIME);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(ANSWER_TIME);
    }
    config.keepalives_idle(Duration::from_secs(5));
    config.keepalives_interval(Duration::from_secs(2));
    config.keepalives_retries(3);
    config
}

/// One connection of its own, and the future that drives it.
async fn connect(
    info: &ConnInfo,
    application_name: &str,
) -> Result<(
    tokio_postgres::Client,
    tokio_postgres::Connection<
        tokio_postgres::Socket,
        <tokio_postgres_rustls::MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<tokio_postgres::Socket>>::Stream,
    >,
)>{
    client_config(info, application_name)
        .connect(info.tls()?)
        .await
        .map_err(|source| DatabaseError::connect(info, source))
}

/// Runs a step with [`ANSWER_TIME`].
async fn answered<T>(
    step: &'static str,
    work: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    match tokio::time::timeout(ANSWER_TIME, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(DatabaseError::Statement { step, source }),
        Err(_) => Err(DatabaseError::NoAnswer { step, after: ANSWER_TIME }),
    }
}

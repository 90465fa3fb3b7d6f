//! What `buildreactor check` asks of PostgreSQL. It changes nothing; all it sends is a NOTIFY on a channel of its own.

mod leases;
mod sessions;
mod sql;

use std::time::Duration;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use self::sessions::{Kind, Session};
use super::migrate::{self, SchemaState, known_version};
use super::schema::{PATH, PATH_OF_TRANSACTION, Schema};
use super::trust::{self, Judge};
use super::{ANSWER_TIME, ConnInfo, Database, Result, SessionLimits, answered};
use crate::report::Chain;

/// Major versions of PostgreSQL that this program is made for.
const OLDEST: i32 = 14;
const NEWEST: i32 = 18;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works; somebody should know.
    Note,
    /// Does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at, in a word or two.
    pub subject: &'static str,
    /// What was found, and for a problem what to do.
    pub text: String,
}

/// What was found, in the order of looking.
#[derive(Debug, Default)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    /// As it should be.
    pub fn ok(&mut self, subject: &'static str, text: impl Into<String>) {
        self.0.push(Finding { level: Level::Ok, subject, text: text.into() });
    }

    /// Works; somebody should know.
    pub fn note(&mut self, subject: &'static str, text: impl Into<String>) {
        self.0.push(Finding { level: Level::Note, subject, text: text.into() });
    }

    /// Does not work.
    pub fn problem(&mut self, subject: &'static str, text: impl Into<String>) {
        self.0.push(Finding { level: Level::Problem, subject, text: text.into() });
    }

    /// Whether something does not work.
    pub fn has_problem(&self) -> bool {
        self.0.iter().any(|finding| finding.level == Level::Problem)
    }
}

/// The worker that is going to use the database.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its name.
    pub worker: String,
    /// Its slots, and what the sessions of its claims are set to.
    pub limits: SessionLimits,
    /// `[lease] lease`.
    pub lease: Duration,
    /// `[lease] grace`.
    pub grace: Duration,
    /// Buildbot masters that it knows.
    pub masters: Vec<String>,
    /// `[worker] labels`.
    pub labels: Vec<String>,
    /// Whether `[retention]` has it delete builds.
    pub deletes_builds: bool,
}

/// A builder whose builds run on a Buildbot master.
#[derive(Clone, Debug)]
pub struct OnMaster {
    /// `builders.name`.
    pub name: String,
    /// `builders.settings`.
    pub settings: String,
    /// Which.
    pub master: String,
}

/// Looks at everything that a worker needs of the database and adds what it sees to `found`. Comes back with the builders that its labels
/// let it build for on masters that it knows.
///
/// # Errors
/// No connection, or it was lost on the way. A statement that the server refuses is a finding.
pub async fn examine(info: &ConnInfo, asked: &Asked, found: &mut Findings) -> Result<Vec<OnMaster>> {
    let session = Session::open(info).await?;
    let client = &session.client;
    let home = answered("look for the schema", Schema::look(client)).await?;
    // Sessions before all that prepares statements: behind transaction pooling those fail in confusing ways.
    if !connection(client, &home, info, found).await? || !sessions_are_ours(&session, info, found).await {
        found.note("the rest", "was not looked at, because of the problem above");
        return Ok(Vec::new());
    }
    // As our own sessions, whatever the role is set to.
    const VIEWS: &str =
        "SELECT set_config(name, '', false) FROM pg_settings WHERE name = 'restrict_nonsystem_relation_kind'";
    answered("look at the database", client.batch_execute(&format!("{PATH}; {VIEWS}"))).await?;
    let mut elsewhere = Vec::new();
    let there = schema(client, &home, info, found).await;
    if keep_on("schema", there, found)?.unwrap_or(true) {
        let outcome = privileges(client, &home, asked, found).await;
        keep_on("privileges", outcome, found)?;
        let outcome = others(client, &home, found).await;
        keep_on("others", outcome, found)?;
        let outcome = triggers(client, &home, found).await;
        keep_on("triggers", outcome, found)?;
        let outcome = masters(client, &home, asked, found).await;
        elsewhere = keep_on("buildbot", outcome, found)?.unwrap_or_default();
        let outcome = connections(client, &home, asked, found).await;
        keep_on("connections", outcome, found)?;
        let outcome = leases::leases(client, &home, asked, found).await;
        keep_on("leases", outcome, found)?;
    }
    let outcome = timeouts(client, info, asked, found).await;
    keep_on("timeouts", outcome, found)?;
    let outcome = durability(client, found).await;
    keep_on("durability", outcome, found)?;
    Ok(elsewhere)
}

/// What the server refused is a finding, and comes back as `None`.
fn keep_on<T>(subject: &'static str, outcome: Result<T>, found: &mut Findings) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.sqlstate().is_some() => {
            found.problem(subject, Chain(&error).to_string());
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

async fn rows(client: &Client, sql: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Result<Vec<Row>> {
    answered("look at the database", client.query_typed(sql, params)).await
}

async fn one(client: &Client, sql: &str) -> Result<Row> {
    first(client, sql, &[]).await
}

async fn first(client: &Client, sql: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Result<Row> {
    answered("look at the database", client.query_typed_one(sql, params)).await
}

/// The server, the way to it, the database. False: nothing else would work.
async fn connection(client: &Client, home: &Schema, info: &ConnInfo, found: &mut Findings) -> Result<bool> {
    const SUBJECT: &str = "connection";
    // In one transaction: behind a transaction pooler a SET would stay with a session that others use next.
    const STEP: &str = "look at the database";
    answered(STEP, client.batch_execute(&format!("BEGIN ISOLATION LEVEL READ COMMITTED; {PATH_OF_TRANSACTION}")))
        .await?;
    let row = one(client, sql::VERSION).await?;
    let (major, version): (i32, String) = (row.get("major"), row.get("version"));
    if major < OLDEST {
        found.problem(SUBJECT, format!("PostgreSQL {version} is too old: use version {OLDEST} to {NEWEST}"));
        return Ok(false);
    }
    let row = first(client, sql::CONNECTION, &[(&home.name(), Type::TEXT)]).await?;
    answered(STEP, client.batch_execute("COMMIT")).await?;
    let tls: Option<String> = row.get("tls");
    let plain = tls.is_none() && !row.get::<_, bool>("socket");
    let way = match tls {
        Some(tls) => format!("with {tls}"),
        None if plain => "over TCP without TLS".to_owned(),
        None => "over a Unix socket".to_owned(),
    };
    found.ok(SUBJECT, format!("PostgreSQL {version}, {way}: {}", info.describe()));
    if major > NEWEST {
        let text = format!("PostgreSQL {major} is newer than this program, which was made for {OLDEST} to {NEWEST}");
        found.note(SUBJECT, text);
    }
    if plain && !row.get::<_, bool>("same_machine") {
        found.note(
            SUBJECT,
            "others on the network can read and change what is sent: add sslmode=verify-full to the connection string",
        );
    }
    if row.get("standby") {
        found.problem(
            SUBJECT,
            "the server is a standby, which takes no builds: connect to the primary, or name all servers and add target_session_attrs=read-write",
        );
        return Ok(false);
    }
    let dbname: String = row.get("dbname");
    if let Some(source) = row.get::<_, Option<&str>>("read_only") {
        let who = if source.contains("user") { "of this role" } else { "of everybody" };
        let text = format!(
            "sessions {who} in database `{dbname}` are read-only unless they say otherwise, as a worker's do and people's INSERTs do not: RESET default_transaction_read_only where it is set (psql shows: \\drds and SHOW config_file)"
        );
        if source.contains("user") {
            found.note(SUBJECT, text);
        } else {
            found.problem(SUBJECT, text);
        }
    }
    let encoding: String = row.get("encoding");
    if encoding != "UTF8" {
        let text = format!(
            "encoding {encoding} cannot hold the output of every build: CREATE DATABASE builds ENCODING 'UTF8' TEMPLATE template0, and use that"
        );
        found.problem("database", text);
    }
    // Invariant 5.
    const ADVICE: &str = "while a build runs, no dead row of its whole database can be vacuumed; give buildreactor a database of its own";
    let others: i64 = row.get("others");
    if others > 0 {
        let tables = if others == 1 { "table" } else { "tables" };
        found.note("database", format!("`{dbname}` also holds {others} other {tables}: {ADVICE}"));
    } else if dbname == "postgres" {
        found.note("database", format!("`postgres` is everybody's: {ADVICE}"));
    } else {
        found.ok("database", format!("`{dbname}` holds nothing else"));
    }
    Ok(true)
}

/// Whether a session is ours alone, as locks, SET and LISTEN need it. False: nothing else would work.
async fn sessions_are_ours(session: &Session, info: &ConnInfo, found: &mut Findings) -> bool {
    const SUBJECT: &str = "sessions";
    match session.kind(info).await {
        Ok(Kind::Ours) => {
            found.ok(SUBJECT, "keep their server process and settings, and hear NOTIFY");
            true
        }
        Ok(Kind::Shared) => {
            found.problem(
                SUBJECT,
                "transaction pooling (pgbouncer?) between us and PostgreSQL: connect to the server itself or use session pooling",
            );
            false
        }
        Ok(Kind::Deaf) => {
            let text = format!(
                "a NOTIFY did not arrive within {} s, so only the poll would find builds: connect to the server itself, without a pooler",
                ANSWER_TIME.as_secs()
            );
            found.problem(SUBJECT, text);
            true
        }
        Err(error) => {
            let text = format!(
                "two sessions beside each other do not work: {}; if there is a pooler (pgbouncer?) between us and PostgreSQL, connect to the server itself or use session pooling with enough connections",
                Chain(&error)
            );
            found.problem(SUBJECT, text);
            false
        }
    }
}

/// False: there is none.
async fn schema(client: &Client, home: &Schema, info: &ConnInfo, found: &mut Findings) -> Result<bool> {
    const SUBJECT: &str = "schema";
    let Some(schema) = home.name() else {
        found.problem(
            SUBJECT,
            "no schema of the search_path exists, or this role may not use it: CREATE SCHEMA or GRANT USAGE, or name another in the connection string (options=-csearch_path=NAME)",
        );
        return Ok(false);
    };
    // The daemon asks the same; for what it may not read, `privileges` names the GRANT.
    let state = migrate::schema_state(info).await?;
    let known = known_version();
    match &state {
        SchemaState::Current { version } => found.ok(SUBJECT, format!("`{schema}` is at version {version}")),
        SchemaState::Newer { version, usable: true } => {
            let text = format!("`{schema}` is at version {version}; this program knows {known}, and can work with it");
            found.note(SUBJECT, text);
        }
        SchemaState::Newer { version, usable: false } => {
            let text = format!(
                "`{schema}` is at version {version}, and this program knows {known}: install the newer program"
            );
            found.problem(SUBJECT, text);
        }
        SchemaState::Older { version } => {
            let text = format!(
                "`{schema}` was migrated by an older program (version {version}, this one brings {known}): run `buildreactor migrate`"
            );
            found.problem(SUBJECT, text);
        }
        SchemaState::Missing => {
            let row = first(client, sql::ELSEWHERE, &[(&schema, Type::TEXT)]).await?;
            let elsewhere: Option<String> = row.get("elsewhere");
            let hint = elsewhere.map_or(String::new(), |there| {
                format!(
                    "; or, as there are some in schema {there}, put that into the search_path and GRANT USAGE on it"
                )
            });
            let text = format!("`{schema}` has no tables of buildreactor: run `buildreactor migrate`{hint}");
            found.problem(SUBJECT, text);
        }
    }
    Ok(state != SchemaState::Missing)
}

/// What others could do, or have done, to the schema; and functions of people's own that sessions of ours call.
async fn others(client: &Client, home: &Schema, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "others";
    let before = found.0.len();
    for role in trust::creators(client, home).await? {
        found.problem(SUBJECT, trust::may_create(home, &role));
    }
    for object in trust::foreign(client, home, Judge::Looking).await? {
        let text = format!(
            "{object} could take the place of PostgreSQL's own or of ours: DROP it, move it to another schema, or ALTER ... OWNER TO the owner of the database"
        );
        found.problem(SUBJECT, text);
    }
    for function in trust::pathless(client, home).await? {
        let text = format!(
            "{}, which {} call, finds no table in sessions of workers, so what it is called for fails there: {};",
            function.function, function.tables, function.remedy
        );
        found.problem(SUBJECT, text);
    }
    if found.0.len() == before {
        found.ok(SUBJECT, "nobody else can put objects before ours, and triggers of your own find their tables");
    }
    Ok(())
}

async fn privileges(client: &Client, home: &Schema, asked: &Asked, found: &mut Findings) -> Result<()> {
    let params: [(&(dyn ToSql + Sync), Type); 2] = [(&home.name(), Type::TEXT), (&asked.deletes_builds, Type::BOOL)];
    let lacking = rows(client, sql::PRIVILEGES, &params).await?;
    for row in &lacking {
        let (role, object): (&str, &str) = (row.get("role"), row.get("object"));
        let (missing, remedy): (&str, &str) = (row.get("missing"), row.get("remedy"));
        found.problem("privileges", format!("role `{role}` lacks {missing} on `{object}`: {remedy}"));
    }
    if lacking.is_empty() {
        found.ok("privileges", "all that a worker needs");
    }
    Ok(())
}

/// Table and name of every trigger that `migrate` creates.
fn expected_triggers() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = migrate::API.iter().flat_map(|text| text.lines());
    lines.filter_map(|line| {
        let (name, rest) = line.strip_prefix("CREATE OR REPLACE TRIGGER ")?.split_once(' ')?;
        Some((rest.split_once(" ON farm.")?.1.split(' ').next()?, name))
    })
}

async fn triggers(client: &Client, home: &Schema, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "triggers";
    let there = rows(client, sql::TRIGGERS, &[(&home.name(), Type::TEXT)]).await?;
    let before = found.0.len();
    for (table, name) in expected_triggers() {
        let row = there.iter().find(|row| (row.get("relation"), row.get("name")) == (table, name));
        // O: fires in ordinary sessions; A: always; R: for replication only; D: disabled.
        match row.map(|row| row.get("enabled")) {
            Some("O" | "A") => {}
            // Wakes are hints (invariant 4).
            Some(_) if matches!(name, "build_queue_wake" | "builders_changed") => {
                let remedy = format!("ALTER TABLE {table} ENABLE TRIGGER {name};");
                let text = format!("`{name}` of `{table}` is disabled, so only the poll finds what is new: {remedy}");
                found.note(SUBJECT, text);
            }
            Some(_) => {
                let remedy = format!("ALTER TABLE {table} ENABLE TRIGGER {name};");
                found.problem(SUBJECT, format!("`{name}` of `{table}` is disabled: {remedy}"));
            }
            None => {
                let remedy = "DROP FUNCTION build_schema_api(); and run `buildreactor migrate`, which makes all anew";
                found.problem(SUBJECT, format!("`{name}` of `{table}` is missing: {remedy}"));
            }
        }
    }
    if found.0.len() == before {
        found.ok(SUBJECT, "all there and enabled");
    }
    Ok(())
}

/// Builders that this worker could not build for, for want of a master; comes back with the others.
async fn masters(client: &Client, home: &Schema, asked: &Asked, found: &mut Findings) -> Result<Vec<OnMaster>> {
    const SUBJECT: &str = "buildbot";
    let params: [(&(dyn ToSql + Sync), Type); 2] = [(&asked.masters, Type::TEXT_ARRAY), (&asked.worker, Type::TEXT)];
    for row in rows(client, &home.sql(sql::MASTERS), &params).await? {
        let (builders, master): (&str, Option<&str>) = (row.get("builders"), row.get("master"));
        let lack = match master {
            Some(master) => format!("there is no section [buildbot.{master}] here"),
            None if asked.masters.is_empty() => "there is no section [buildbot.NAME] here".to_owned(),
            None => format!("there is more than one master here, and the settings of {builders} name none"),
        };
        let who = if row.get("others") {
            ": other workers have to build"
        } else {
            ", and no other worker is registered that could build"
        };
        found.note(SUBJECT, format!("{lack}{who} {builders}"));
    }
    let params: [(&(dyn ToSql + Sync), Type); 2] =
        [(&asked.masters, Type::TEXT_ARRAY), (&asked.labels, Type::TEXT_ARRAY)];
    let builders = rows(client, &home.sql(sql::ON_MASTERS), &params).await?;
    let on_master =
        |row: &Row| OnMaster { name: row.get("name"), settings: row.get("settings"), master: row.get("master") };
    Ok(builders.iter().map(on_master).collect())
}

/// The worker's name, and room for the connections of all workers.
async fn connections(client: &Client, home: &Schema, asked: &Asked, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "connections";
    let workers = rows(client, &home.sql(sql::WORKERS), &[(&asked.worker, Type::TEXT)]).await?;
    let (slots, holder): (Vec<i32>, Option<String>) =
        workers.first().map_or((Vec::new(), None), |row| (row.get("slots"), row.get("holder")));
    match holder {
        Some(holder) => found.note("worker", format!("name `{}` is in use by {holder}", asked.worker)),
        None => found.ok("worker", format!("name `{}` is free", asked.worker)),
    }
    let own = Database::budget(asked.limits.slots);
    let all = own + slots.iter().map(|slots| Database::budget(slots.unsigned_abs())).sum::<u32>();
    let needed = match slots.len() {
        0 => format!("this worker needs up to {own}"),
        others => format!("this worker needs up to {own}, and all {} workers {all}", others + 1),
    };
    let (before, mut limits) = (found.0.len(), Vec::new());
    for row in rows(client, sql::CONNECTIONS, &[]).await? {
        let (limit, room, used): (String, i64, i64) = (row.get("what"), row.get("room"), row.get("used"));
        if i64::from(all) > room {
            let remedy: &str = row.get("remedy");
            found.problem(SUBJECT, format!("{needed}, but {limit}: {remedy}, or give workers fewer slots"));
        } else if i64::from(all) + used > room {
            found.note(SUBJECT, format!("{needed}; {limit}, and others use {used} of them now"));
        }
        limits.push(limit);
    }
    if found.0.len() == before {
        found.ok(SUBJECT, format!("{needed}; {}", limits.join(", ")));
    }
    Ok(())
}

/// What the server would end a session for, and whether a worker's own settings prevail over it.
async fn timeouts(client: &Client, info: &ConnInfo, asked: &Asked, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "timeouts";
    let lease = asked.lease.as_secs_f64();
    for row in rows(client, sql::TIMEOUTS, &[]).await? {
        let (name, seconds, source): (&str, f64, &str) = (row.get("name"), row.get("seconds"), row.get("source"));
        if seconds > 0.0 && seconds < lease {
            let text = format!("{name} is {seconds} s ({source}), shorter than a lease; workers set their own");
            found.note(SUBJECT, text);
        }
    }
    let database = Database::new(info.clone(), asked.limits, "buildreactor check")?;
    let (claim, work) = (database.claim_session().await?, database.work().await?);
    let claim_idle = asked.limits.claim_idle.as_secs_f64();
    let mut prevail = true;
    for (what, session, wanted) in [
        ("hold a claim", &claim, [Some(claim_idle), Some(0.0), Some(0.0), Some(0.0)]),
        // Short statements are limited, by values of our own.
        ("run short statements or wait", &work, [None, Some(0.0), None, Some(0.0)]),
    ] {
        // In order of their names; before PostgreSQL 17 there is no last one.
        for (row, wanted) in rows(session, sql::TIMEOUTS, &[]).await?.iter().zip(wanted) {
            let (name, seconds, source): (&str, f64, &str) = (row.get("name"), row.get("seconds"), row.get("source"));
            if let Some(wanted) = wanted.filter(|wanted| (seconds - wanted).abs() >= 0.001) {
                prevail = false;
                let text = format!(
                    "{name} is {seconds} s ({source}), not {wanted} s, in sessions that {what}: ALTER ROLE ... IN DATABASE ... SET {name} = '{wanted}s'; for the worker's role"
                );
                found.problem(SUBJECT, text);
            }
        }
    }
    if prevail {
        found.ok(SUBJECT, format!("a claim's session ends {claim_idle} s after its last ping, and for nothing else"));
    }
    Ok(())
}

async fn durability(client: &Client, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "durability";
    let off = rows(client, sql::NOT_DURABLE, &[]).await?;
    for row in &off {
        let (name, source): (&str, &str) = (row.get("name"), row.get("source"));
        found.note(SUBJECT, format!("{name} is off ({source}): a crash of the server may lose the last results"));
    }
    if off.is_empty() {
        found.ok(SUBJECT, "a recorded result survives a crash of the server");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_trigger_of_the_api_is_expected() {
        let written: usize = migrate::API.iter().map(|text| text.matches("CREATE OR REPLACE TRIGGER ").count()).sum();
        let expected: Vec<_> = expected_triggers().collect();
        assert!(expected.contains(&("build_queue", "build_queue_wake")), "{expected:?}");
        assert_eq!(expected.len(), written);
    }
}

//! The command line: one file a command.

mod check;
mod demo;
mod hidden;
mod log;
mod log_writer;
mod migrate;
mod output;
mod run;
mod terminal;
mod watch;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use self::log_writer::{Log, LogWriter, Style};
use self::output::{Stdout, is_closed_pipe, note};

use crate::config::{self, Config};
use crate::database::migrate::MigrateError;
use crate::database::{ConnInfo, DatabaseError};
use crate::model::BuildId;
use crate::report::Chain;

/// PostgreSQL as a build server: INSERT a row, get a build.
#[derive(Parser)]
#[command(name = "buildreactor", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Arguments {
    /// Configuration file (TOML); without it, /etc/buildreactor/buildreactor.toml if that exists, else defaults
    #[arg(long, short, global = true, value_name = "FILE", env = "BUILDREACTOR_CONFIG")]
    config: Option<PathBuf>,

    /// Database: a URL (postgresql://user@host/builds), a key=value string, or a name; else DATABASE_URL, else `[database] url`, else PG* variables
    #[arg(long, short, global = true, value_name = "CONNECTION")]
    database: Option<String>,

    /// Write the log of the daemon (`run`) as JSON, one object a line
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
A first build, with psql:
  INSERT INTO builders (name, script) VALUES ('hello', 'echo hello');
  INSERT INTO build_queue (builder) VALUES ('hello') RETURNING build_id;

Exit codes: 0 done; 1 something is wrong, or the build did not pass; 2 wrong command line; 66 no such build;
69 database unreachable; 70 a bug of buildreactor; 75 try again; 78 wrong configuration, schema or rights;
130 watch ID was interrupted.

BUILDREACTOR_LOG sets how much the daemon logs: error, warn, info (default), debug, or per room
(info,buildreactor::reactor=debug).";

const CHECK_HELP: &str = "Exit codes: 0 no PROBLEM; 1 a PROBLEM line; 69 database unreachable; 78 the configuration file, or what it says of the database.";
const RUN_HELP: &str = "\
Exit codes: 0 left as it was told; 2 wrong command line; 69, 70, 75 start it again: the database, a bug, the folder or the
worker's name; 78 not before somebody has changed configuration, schema or rights; `buildreactor check` says what.";
const WATCH_HELP: &str = "\
Exit codes with ID: 0 it passed; 1 it did not; 66 there is no such build; 69 database unreachable; 78 wrong configuration or schema;
130 interrupted: nobody knows.";

#[derive(Subcommand)]
enum Command {
    /// Run builds: a worker, until SIGTERM (what runs goes on, for its next start), SIGINT (what runs is stopped and given back to the queue) or SIGUSR1 (what runs is finished first)
    #[command(after_help = RUN_HELP)]
    Run(run::Arguments),
    /// Create or upgrade the tables, views and functions in the database; safe to run twice, and while builds run
    Migrate,
    /// Look for whatever would keep a worker from working: folder, database, pooler, privileges, limits, mail, Buildbot masters; one line each
    #[command(after_help = CHECK_HELP)]
    Check(check::Arguments),
    /// Show what waits, runs and has finished; or wait for one build: exits with 0 if it passed, else 1
    #[command(after_help = WATCH_HELP)]
    Watch(watch::Arguments),
    /// Print the log of a build; -f follows it until the build ends
    Log(log::Arguments),
    /// Show everything once: a throw-away PostgreSQL, a worker, three builds watched with psql; removes it all at the end
    Demo(demo::Arguments),
    /// (internal) Own the processes of builds for a daemon
    #[command(hide = true)]
    Keeper {
        /// The worker's folder
        dir: PathBuf,
    },
}

/// Exit codes, as in sysexits.h.
mod exit {
    pub const NO_INPUT: u8 = 66;
    pub const UNAVAILABLE: u8 = 69;
    pub const SOFTWARE: u8 = 70;
    pub const TEMPFAIL: u8 = 75;
    pub const CONFIG: u8 = 78;
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    // Before there are threads, which inherit the mask.
    crate::executor::process::reset_signals();
    // Nobody of the same user may look into our memory, open files and environment, or attach to us. Children are as usual from their
    // exec on; the keeper does this again.
    let _dumpable = nix::sys::prctl::set_dumpable(false);
    let line = hidden::CommandLine::take();
    let arguments = match Arguments::try_parse_from(&line.arguments) {
        Ok(arguments) => arguments,
        Err(error) => return help(&error),
    };
    // Before anything else has threads: the keeper forks.
    if let Command::Keeper { dir } = &arguments.command {
        return crate::executor::process::keeper::keep(dir);
    }
    if let Command::Run(_) = arguments.command
        && let Err(error) = line.hide()
    {
        note(&format!("the environment that I was started with stays in sight of root's processes: {error}"));
    }
    let style = match arguments.json {
        true => Style::Json,
        false if std::io::stderr().is_terminal() => Style::Terminal,
        false => Style::Text,
    };
    let log = match Log::to_stderr(style) {
        Ok(log) => log,
        Err(error) => {
            note(&format!("cannot start the thread that writes the log: {error}"));
            return ExitCode::from(exit::TEMPFAIL);
        }
    };
    let code = start_log(&arguments, log.writer()).and_then(|()| dispatch(arguments));
    // What a full disk has not taken yet. Where the reader has gone, the command's own code holds.
    let code = code.and_then(|code| match Stdout.flush().map_err(anyhow::Error::from) {
        Err(error) if !is_closed_pipe(&error) => Err(error),
        Ok(()) | Err(_) => Ok(code),
    });
    match code {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            // After the lines of the log, and like them: whoever does not read them keeps no daemon from ending.
            let say = |line: &str| log.writer().line(format!("buildreactor: {line}\n").into_bytes());
            say(&terminal::harmless(&Chain(error.as_ref()).to_string()));
            if let Some(cure) = cure(&error) {
                say(cure);
            }
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Prints what clap has to say: help to standard output, a refusal to standard error.
fn help(said: &clap::Error) -> ExitCode {
    match said.print().and_then(|()| std::io::stdout().flush()) {
        Err(error) if !said.use_stderr() && error.kind() != std::io::ErrorKind::BrokenPipe => {
            note(&format!("standard output cannot be written: {error}"));
            ExitCode::FAILURE
        }
        Ok(()) | Err(_) => ExitCode::from(u8::try_from(said.exit_code()).unwrap_or(2)),
    }
}

/// What a command was asked for cannot be.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("there is no build {0}")]
    NoSuchBuild(BuildId),
    #[error(
        "BUILDREACTOR_LOG: {0}, it must be error, warn, info, debug, trace or off, or such with rooms, for example `info,buildreactor::reactor=debug`"
    )]
    Log(String),
    #[error("--embedded brings its own database: leave out --database, DATABASE_URL and [database] url")]
    TwoDatabases,
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut config = Config::load(arguments.config.as_deref(), &config::environment)?;
    if arguments.database.is_some() {
        config.database.url = arguments.database;
    }
    let code = runtime.block_on(async {
        match arguments.command {
            Command::Run(arguments) => run::run(arguments, config).await,
            Command::Migrate => migrate::run(&config).await,
            Command::Check(arguments) => check::run(arguments, &config).await,
            Command::Watch(arguments) => watch::run(arguments, &config).await,
            Command::Log(arguments) => log::run(arguments, &config).await,
            Command::Demo(arguments) => demo::run(arguments).await,
            Command::Keeper { .. } => Ok(ExitCode::SUCCESS),
        }
    });
    // What still blocks a thread (a folder being removed) does not keep a command from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

/// The database that the configuration names.
fn conninfo(config: &Config) -> anyhow::Result<ConnInfo> {
    Ok(ConnInfo::from_env(config.database.url.as_deref())?)
}

/// Whether a trouble with the state folder may be over later without anybody changing the configuration.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    !matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::NotADirectory
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::InvalidInput
            | ErrorKind::AlreadyExists
            | ErrorKind::Unsupported
    )
}

/// Whose help it takes.
fn cure(error: &anyhow::Error) -> Option<&'static str> {
    use crate::daemon::DaemonError;
    if let Some(error) = error.downcast_ref::<MigrateError>() {
        return error.is_forbidden().then_some("migrate as the owner of the database, not as a worker");
    }
    match error.downcast_ref() {
        Some(DaemonError::Folder { source, .. }) if !is_passing(source) => {
            Some("`buildreactor check` says what would help")
        }
        Some(DaemonError::Database(error)) if error.is_forbidden() => {
            Some("`buildreactor check` says which rights are missing, and deploy/roles.sql gives them")
        }
        _ => None,
    }
}

/// Which exit code says what kind of error this is.
fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(refused) = error.downcast_ref::<Refused>() {
        return match refused {
            Refused::NoSuchBuild(_) => exit::NO_INPUT,
            Refused::Log(_) | Refused::TwoDatabases => exit::CONFIG,
        };
    }
    if error.is::<config::ConfigErrors>() || error.is::<crate::database::conninfo::ConnInfoError>() {
        return exit::CONFIG;
    }
    if let Some(error) = error.downcast_ref::<crate::daemon::DaemonError>() {
        use crate::daemon::DaemonError;
        return match error {
            DaemonError::Database(error) => database_exit_code(error),
            // Somebody else's lock, a full disk: a supervisor should try again.
            DaemonError::Folder { source, .. } if is_passing(source) => exit::TEMPFAIL,
            DaemonError::Kick { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => exit::TEMPFAIL,
            DaemonError::Schema(_)
            | DaemonError::Kick { .. }
            | DaemonError::Folder { .. }
            | DaemonError::Mail(_)
            | DaemonError::Buildbot(_) => exit::CONFIG,
            DaemonError::Signals(_) => exit::SOFTWARE,
        };
    }
    if let Some(error) = error.downcast_ref::<MigrateError>() {
        return match error {
            error if error.is_forbidden() => exit::CONFIG,
            MigrateError::Database(error) => database_exit_code(error),
            MigrateError::Newer { .. } | MigrateError::NoSchema | MigrateError::Foreign { .. } => exit::CONFIG,
            MigrateError::Migration(_) => 1,
            MigrateError::Locked { .. } => exit::TEMPFAIL,
        };
    }
    error.downcast_ref::<DatabaseError>().map_or(1, database_exit_code)
}

fn database_exit_code(error: &DatabaseError) -> u8 {
    match error {
        DatabaseError::ConnInfo(_) | DatabaseError::NoPassword { .. } | DatabaseError::NoSchema { .. } => exit::CONFIG,
        DatabaseError::NameInUse { .. } => exit::TEMPFAIL,
        DatabaseError::Connect { .. } | DatabaseError::Pool { .. } | DatabaseError::NoAnswer { .. } => {
            // The server answered, and refuses us: no such database, role or password.
            if error.is_transient() { exit::UNAVAILABLE } else { exit::CONFIG }
        }
        DatabaseError::Statement { .. } if error.sqlstate().is_none() => exit::UNAVAILABLE,
        DatabaseError::Statement { .. } if error.is_forbidden() || error.is_bad_data() => exit::CONFIG,
        DatabaseError::Statement { .. } | DatabaseError::Unexpected { .. } => 1,
    }
}

fn start_log(arguments: &Arguments, writer: LogWriter) -> anyhow::Result<()> {
    // It says itself what happens.
    let demo = matches!(arguments.command, Command::Demo(_));
    let usual = if demo { "warn" } else { "info,tokio_postgres=error,deadpool_postgres=error,refinery_core=warn" };
    let filter = log_filter(std::env::var("BUILDREACTOR_LOG").ok().as_deref().unwrap_or(usual))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    // Its own words about errors would go to standard error directly, and panic there.
    let builder = builder.log_internal_errors(false);
    if arguments.json {
        builder.json().flatten_event(true).init();
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
    // The usual hook waits for a reader that has stopped reading.
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::capture();
        match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => tracing::error!("{panic}\n{backtrace}"),
            _ => tracing::error!("{panic}"),
        }
    }));
    Ok(())
}

/// `EnvFilter` takes a level that is misspelt for a room of which everything is logged, and logs nothing else; blanks confuse it.
fn log_filter(text: &str) -> Result<EnvFilter, Refused> {
    let directives: Vec<&str> = text.split(',').map(str::trim).filter(|directive| !directive.is_empty()).collect();
    for directive in &directives {
        let level = directive.rsplit('=').next().unwrap_or(directive);
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            return Err(Refused::Log(format!("`{directive}` has no level")));
        }
    }
    EnvFilter::builder().parse(directives.join(",")).map_err(|error| Refused::Log(Chain(&error).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_none_is_refused() {
        for (given, taken) in [
            ("info", "info"),
            ("WARN", "warn"),
            ("off", "off"),
            ("info,buildreactor::reactor=debug", "buildreactor::reactor=debug,info"),
            (" warn , rustls=trace", "rustls=trace,warn"),
        ] {
            assert_eq!(log_filter(given).map(|filter| filter.to_string()).ok().as_deref(), Some(taken), "{given}");
        }
        for (bad, directive) in [
            ("inof", "inof"),
            ("info,buildreactor::reactor=debgu", "buildreactor::reactor=debgu"),
            ("buildreactor", "buildreactor"),
            ("info,buildreactor=", "buildreactor="),
        ] {
            let refusal = log_filter(bad).err().map(|error| error.to_string());
            assert!(refusal.is_some_and(|text| text.contains(&format!("`{directive}` has no level"))), "{bad}");
        }
    }
}

//! `buildreactor run`

use std::path::PathBuf;
use std::process::ExitCode;

use crate::config::Config;
use crate::daemon::{self, Left};
use crate::embedded::{Options, Server, StopMode};

#[derive(clap::Args)]
pub struct Arguments {
    /// Keep a private PostgreSQL in DIR and use it: no server to install; started and stopped with this daemon
    #[arg(long, value_name = "DIR")]
    embedded: Option<PathBuf>,
}

/// Runs a worker until it is told to leave.
pub async fn run(arguments: Arguments, mut config: Config) -> anyhow::Result<ExitCode> {
    tracing::info!("buildreactor {} starts; configuration: {}", env!("CARGO_PKG_VERSION"), config.source());
    let Some(dir) = arguments.embedded else {
        return leave(daemon::run(&config, super::conninfo(&config)?).await);
    };
    if config.database.url.is_some() {
        return Err(super::Refused::TwoDatabases.into());
    }
    let options = Options { dir: Some(dir), ..Options::default() };
    let mut server = tokio::task::spawn_blocking(move || Server::start(options)).await??;
    config.database.url = Some(server.url("postgres"));
    // All in one place, which needs no rights elsewhere.
    if config.worker.state_dir == Config::default().worker.state_dir {
        config.worker.state_dir = server.data_dir().with_file_name("workers");
    }
    let info = super::conninfo(&config)?;
    crate::database::migrate::migrate(&info).await?;
    tracing::info!("look at it with: psql '{}'", server.url("postgres"));
    let code = leave(daemon::run(&config, info).await);
    tokio::task::spawn_blocking(move || server.stop(StopMode::Fast)).await??;
    code
}

fn leave(result: Result<Left, daemon::DaemonError>) -> anyhow::Result<ExitCode> {
    match result? {
        Left::Ordered => {
            tracing::info!("stopped");
            Ok(ExitCode::SUCCESS)
        }
        Left::Failed => Ok(ExitCode::from(super::exit::SOFTWARE)),
    }
}

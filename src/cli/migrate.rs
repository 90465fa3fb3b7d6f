//! `buildreactor migrate`

use std::io::Write;
use std::process::ExitCode;

use super::output::{Stdout, is_closed_pipe};
use crate::config::Config;
use crate::database::migrate::migrate;

/// Migrates, and says what was done.
pub async fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let info = super::conninfo(config)?;
    let report = migrate(&info).await?;
    let place = format!("schema `{}` of {}", report.schema, info.describe());
    let mut lines: Vec<String> = report.applied.iter().map(|name| format!("applied {name}")).collect();
    lines.push(if report.applied.is_empty() && !report.api {
        format!("{place} is up to date (version {})", report.version)
    } else {
        format!("{place} is now at version {}", report.version)
    });
    lines.extend(report.notes.iter().cloned());
    match writeln!(Stdout, "{}", lines.join("\n")).map_err(anyhow::Error::from) {
        // It is done, whether anybody reads of it or not.
        Err(error) if !is_closed_pipe(&error) => Err(error),
        Ok(()) | Err(_) => Ok(ExitCode::SUCCESS),
    }
}

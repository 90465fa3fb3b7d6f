//! `buildreactor migrate`

use std::process::ExitCode;

use crate::config::Config;
use crate::database::migrate::migrate;

/// Migrates, and says what was done.
pub async fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let info = super::conninfo(config)?;
    let report = migrate(&info).await?;
    let place = format!("schema `{}` of {}", report.schema, info.describe());
    if report.applied.is_empty() && !report.api {
        println!("{place} is up to date (version {})", report.version);
    } else {
        for name in &report.applied {
            println!("applied {name}");
        }
        println!("{place} is now at version {}", report.version);
    }
    for note in &report.notes {
        println!("{note}");
    }
    Ok(ExitCode::SUCCESS)
}

//! buildreactor: PostgreSQL as a build server. See ARCHITECTURE.md for the map of the rooms below.

pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod database;
pub mod embedded;
pub mod executor;
pub mod logs;
pub mod mail;
pub mod model;
pub mod reactor;
pub mod report;
pub mod tasks;

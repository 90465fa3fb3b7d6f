//! One integration binary, a module a feature. Everything is real: PostgreSQL, daemons, processes, psql.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod buildbot;
mod claims;
mod clock_change;
mod commands_check;
mod commands_watch;
mod conninfo_tls;
mod deploy;
mod failover;
mod faults;
mod keeper;
mod leases;
mod leases_faults;
mod leases_limits;
mod logs;
mod mail;
mod needs;
mod netns;
mod process;
mod queue;
mod random;
mod refusals;
mod retention;
mod schedules;
mod secrets;
mod sql;
mod structure;
mod submitters;
mod support;
mod torture;
mod transcripts;
mod trees;
mod waiting;
mod wakes;

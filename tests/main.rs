//! One integration binary, a module a feature. Everything is real: PostgreSQL, daemons, processes, psql.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod buildbot;
mod claims;
mod clock_change;
mod commands_check;
mod commands_watch;
mod conninfo_tls;
mod deploy;
mod encodings;
mod failover;
mod faults;
mod floods;
mod leases;
mod leases_faults;
mod leases_limits;
mod logs;
mod mail;
mod netns;
mod process;
mod queue;
mod random;
mod retention;
mod schedules;
mod sql;
mod structure;
mod support;
mod torture;
mod transcripts;
mod trees;
mod waiting;
mod wakes;

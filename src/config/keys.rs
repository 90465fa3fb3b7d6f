//! The table of all keys: the only place that knows which exist and what each must look like.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::Config;
use super::value::{DAY, Value};

/// Sections of the design whose behaviour does not exist yet. An issue that adds one takes it out
/// here and adds its keys to [`all`].
pub(super) const NOT_YET: &[&str] = &["http"];

/// One setting.
pub(super) struct Key {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
    /// Ends the sentence "it must be ...".
    pub(super) must: &'static str,
    /// A good value as TOML; without quotes and brackets it is a variable's.
    pub(super) example: &'static str,
    pub(super) set: fn(&mut Config, &Value<'_>) -> Result<(), String>,
}

impl Key {
    /// `BUILDREACTOR_SECTION_KEY`.
    pub(super) fn variable(&self) -> String {
        format!("BUILDREACTOR_{}_{}", self.section, self.name).to_uppercase()
    }

    /// The example as a line of the file.
    pub(super) fn file_example(&self) -> String {
        format!("`{} = {}`", self.name, self.example)
    }

    /// The example as an assignment in a shell's manner.
    pub(super) fn variable_example(&self, variable: &str) -> String {
        let plain = self.example.replace(['"', '[', ']'], "");
        format!("`{variable}={plain}`")
    }
}

const AGES: RangeInclusive<Duration> = Duration::from_secs(1)..=DAY.saturating_mul(36_500);
const AGE_MUST: &str = "a duration with a unit, from 1 s to 36500 days (left out: for ever)";
const LEASE_TIMES: RangeInclusive<Duration> = Duration::from_millis(1)..=DAY;
const LEASE_MUST: &str = "a duration with a unit, from 1 ms to 1 day";

/// Those of `[mail]` are in a file of their own.
pub(super) fn all() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().chain(super::mail::KEYS)
}

static KEYS: &[Key] = &[
    Key {
        section: "database",
        name: "url",
        must: "a connection string (left out: the `PG*` variables)",
        example: "\"postgresql:///builds\"",
        set: |c, v| v.text().map(|url| c.database.url = Some(url)),
    },
    Key {
        section: "worker",
        name: "name",
        must: "1 to 63 characters of `A-Z a-z 0-9 . _ -`, not only dots",
        example: "\"linux-1\"",
        set: |c, v| v.name().map(|name| c.worker.name = name),
    },
    Key {
        section: "worker",
        name: "slots",
        must: "a whole number from 1 to 1000",
        example: "2",
        set: |c, v| v.count(1..=1000).map(|slots| c.worker.slots = slots),
    },
    Key {
        section: "worker",
        name: "labels",
        must: "a list of labels, neither empty nor with a comma in them",
        example: "[\"linux\", \"big\"]",
        set: |c, v| v.list().map(|labels| c.worker.labels = labels),
    },
    Key {
        section: "worker",
        name: "builders",
        must: "a list of builder names, in which `*` stands for any characters and `?` for one",
        example: "[\"linux-*\", \"docs\"]",
        set: |c, v| v.patterns().map(|patterns| c.worker.builders = patterns),
    },
    Key {
        section: "worker",
        name: "state_dir",
        must: "an absolute path",
        example: "\"/var/lib/buildreactor\"",
        set: |c, v| v.absolute_path().map(|path| c.worker.state_dir = path),
    },
    Key {
        section: "worker",
        name: "min_free_disk",
        must: "a whole number and a unit such as `kB`, `MiB` or `GiB`, or 0",
        example: "\"1 GiB\"",
        set: |c, v| v.size(0).map(|bytes| c.worker.min_free_disk = bytes),
    },
    Key {
        section: "worker",
        name: "pid_namespace",
        must: "true or false",
        example: "false",
        set: |c, v| v.boolean().map(|yes| c.worker.pid_namespace = yes),
    },
    Key {
        section: "reactor",
        name: "poll",
        must: "a duration with a unit, from 100 ms to 1 day",
        example: "\"30s\"",
        set: |c, v| v.duration(Duration::from_millis(100)..=DAY).map(|poll| c.reactor.poll = poll),
    },
    Key {
        section: "lease",
        name: "ping",
        must: LEASE_MUST,
        example: "\"5s\"",
        set: |c, v| v.duration(LEASE_TIMES).map(|ping| c.lease.ping = ping),
    },
    Key {
        section: "lease",
        name: "lease",
        must: LEASE_MUST,
        example: "\"40s\"",
        set: |c, v| v.duration(LEASE_TIMES).map(|lease| c.lease.lease = lease),
    },
    Key {
        section: "lease",
        name: "grace",
        must: LEASE_MUST,
        example: "\"60s\"",
        set: |c, v| v.duration(LEASE_TIMES).map(|grace| c.lease.grace = grace),
    },
    Key {
        section: "log",
        name: "database_limit",
        must: "a whole number and a unit such as `kB`, `MiB` or `GiB`, at least 16 KiB",
        example: "\"1 MiB\"",
        set: |c, v| v.size(16 << 10).map(|bytes| c.log.database_limit = bytes),
    },
    Key {
        section: "log",
        name: "file_limit",
        must: "a whole number and a unit such as `kB`, `MiB` or `GiB`, at least 64 KiB",
        example: "\"256 MiB\"",
        set: |c, v| v.size(64 << 10).map(|bytes| c.log.file_limit = bytes),
    },
    Key {
        section: "log",
        name: "keep",
        must: "a duration with a unit, from 1 ms to 36500 days",
        example: "\"30 days\"",
        set: |c, v| v.duration(Duration::from_millis(1)..=36_500 * DAY).map(|keep| c.log.keep = keep),
    },
    Key {
        section: "retention",
        name: "builds",
        must: AGE_MUST,
        example: "\"90 days\"",
        set: |c, v| v.duration(AGES).map(|age| c.retention.builds = Some(age)),
    },
    Key {
        section: "retention",
        name: "builds_per_builder",
        must: "a whole number from 1 to 1000000 (left out: no limit)",
        example: "1000",
        set: |c, v| v.count(1..=1_000_000).map(|count| c.retention.builds_per_builder = Some(count)),
    },
    Key {
        section: "retention",
        name: "logs",
        must: "a duration with a unit, from 1 s to 36500 days (left out: as long as their builds)",
        example: "\"30 days\"",
        set: |c, v| v.duration(AGES).map(|age| c.retention.logs = Some(age)),
    },
    Key {
        section: "kick",
        name: "listen",
        must: "an IP address and a port from 1 to 65535",
        example: "\"127.0.0.1:7999\"",
        set: |c, v| v.socket_address().map(|address| c.kick.listen = Some(address)),
    },
];

/// The sections of [`all`] keys, each once.
pub(super) fn sections() -> Vec<&'static str> {
    let mut sections: Vec<_> = all().map(|key| key.section).collect();
    sections.dedup();
    sections
}

/// The candidate that `name` was probably meant to be: at most one letter in three differs.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::osa_distance(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .map(|(_, candidate)| candidate)
}

//! What a mail says, as the templates see it.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use serde_json::Value;

use super::text::{clean_line, last_lines, span};
use crate::config::Mail;
use crate::database::mail::{Facts, Outgoing};
use crate::model::BuildId;

/// The most of a value that is shown, in characters.
const VALUE: usize = 2000;

/// Which build, and how it ended.
#[derive(Debug, Clone, Serialize)]
struct Verdict {
    builder: String,
    id: i64,
    attempt: i32,
    event: String,
    verdict: String,
    headline: &'static str,
    transition: Option<&'static str>,
    colour: &'static str,
    branch: Option<String>,
    url: Option<String>,
}

impl Verdict {
    fn new(settings: &Mail, row: &Outgoing, properties: Option<&BTreeMap<String, Value>>) -> Verdict {
        let (headline, colour) = headline(&row.verdict);
        Verdict {
            builder: row.builder.clone(),
            id: row.build.0,
            attempt: row.attempt,
            event: row.event.clone(),
            verdict: row.verdict.clone(),
            headline,
            transition: transition(row),
            colour,
            branch: branch(row, properties),
            url: url(settings, row.build),
        }
    }
}

/// One build.
#[derive(Debug, Clone, Serialize)]
pub struct Single {
    project: String,
    #[serde(flatten)]
    build: Verdict,
    worker: Option<String>,
    detail: Option<String>,
    exit: Option<String>,
    ran: Option<String>,
    ran_seconds: Option<f64>,
    usual: Option<String>,
    usual_seconds: Option<f64>,
    waited: Option<String>,
    reason: Option<String>,
    submitted_by: String,
    properties: BTreeMap<String, Value>,
    own: BTreeMap<String, Value>,
    previous_id: Option<i64>,
    previous_state: Option<String>,
    good_id: Option<i64>,
    facts: Vec<Fact>,
    log: Option<String>,
    dbname: String,
    external_url: Option<String>,
    unsubscribe: Option<String>,
}

/// A line of the table: what, and its value.
#[derive(Debug, Clone, Serialize)]
struct Fact {
    name: String,
    value: String,
}

/// Many builds.
#[derive(Debug, Clone, Serialize)]
pub struct Digest {
    project: String,
    per_hour: u32,
    failed: usize,
    builds: Vec<Line>,
    dbname: String,
    unsubscribe: Option<String>,
}

/// One of them.
#[derive(Debug, Clone, Serialize)]
struct Line {
    #[serde(flatten)]
    build: Verdict,
    at: String,
}

/// How it ended, in capitals; as a class of the page.
fn headline(verdict: &str) -> (&'static str, &'static str) {
    match verdict {
        "passed" => ("PASSED", "passed"),
        "failed" => ("FAILED", "failed"),
        "timed_out" => ("TIMED OUT", "failed"),
        _ => ("ERROR", "error"),
    }
}

/// What changed with it.
fn transition(row: &Outgoing) -> Option<&'static str> {
    match row.event.as_str() {
        "problem" if row.previous_state.is_some() => Some("was passing"),
        "problem" => Some("its first build"),
        "still_failing" => Some("still failing"),
        "fixed" => Some("was failing"),
        _ => None,
    }
}

fn branch(row: &Outgoing, properties: Option<&BTreeMap<String, Value>>) -> Option<String> {
    let plain = properties.and_then(|all| all.get("branch")).and_then(Value::as_str).unwrap_or_default();
    let branch = if row.branch.is_empty() { plain } else { &row.branch };
    let branch = clean_line(branch, 60);
    (!branch.is_empty()).then_some(branch)
}

fn url(settings: &Mail, build: BuildId) -> Option<String> {
    settings.build_url.as_ref().map(|url| url.replace("{id}", &build.0.to_string()))
}

/// By the clock and in the zone of the machine that sends it.
fn at(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %Z").to_string()
}

/// `signal 9 (SIGKILL)`.
fn exit(facts: &Facts) -> Option<String> {
    if let Some(code) = facts.exit_code {
        return Some(format!("exit code {code}"));
    }
    facts.term_signal.map(|number| match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => format!("signal {number} ({signal})"),
        Err(_) => format!("signal {number}"),
    })
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => clean_line(text, VALUE),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            clean_line(&value.to_string(), VALUE)
        }
    }
}

impl Single {
    /// Of `row`.
    pub fn new(settings: &Mail, row: &Outgoing, facts: Facts) -> Single {
        let some =
            |text: Option<&String>, most| text.map(|text| clean_line(text, most)).filter(|text| !text.is_empty());
        let detail = some(facts.detail.as_ref(), VALUE);
        let reason = some(facts.reason.as_ref(), VALUE);
        let (ran, usual, waited) = (facts.ran.map(span), facts.usual.map(span), facts.waited.map(span));
        let exit = exit(&facts);
        let mut lines = Vec::new();
        let mut say = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                lines.push(Fact { name: clean_line(name, 100), value });
            }
        };
        say(
            "ran",
            ran.as_ref().map(|ran| match &usual {
                Some(usual) => format!("{ran}, usually {usual}"),
                None => ran.clone(),
            }),
        );
        say("waited", waited.clone());
        say("finished", facts.finished_at.map(at));
        // The detail says it too, but not by name.
        say("ended by", exit.clone().filter(|exit| detail.as_ref() != Some(exit)));
        let worker = facts.worker.as_deref().map_or(String::new(), |worker| format!(" on {worker}"));
        say("attempt", Some(format!("{}{worker}", row.attempt)));
        say("reason", reason.clone());
        say("asked for by", Some(clean_line(&facts.submitted_by, 200)));
        say(
            "build before",
            row.previous_build.zip(row.previous_state.as_ref()).map(|(build, state)| {
                let again = if build == row.build { ", this one, run again" } else { "" };
                format!("#{} {}{again}", build.0, state.replace('_', " "))
            }),
        );
        if row.verdict != "passed" {
            say(
                "last good build",
                Some(match (row.good_build, facts.good_at) {
                    (Some(build), Some(time)) => format!("#{}, {}", build.0, at(time)),
                    (Some(build), None) => format!("#{}", build.0),
                    (None, _) => "none".to_owned(),
                }),
            );
        }
        for (name, value) in &facts.properties {
            say(name, Some(shown(value)));
        }
        for (name, value) in facts.own.iter().filter(|(_, value)| !value.is_null()) {
            say(name, Some(shown(value)));
        }
        say("see", some(facts.external_url.as_ref(), VALUE));
        let log = last_lines(&facts.log, settings.log_lines as usize);
        Single {
            project: settings.project.clone(),
            build: Verdict::new(settings, row, Some(&facts.properties)),
            worker: facts.worker,
            detail,
            exit,
            ran,
            ran_seconds: facts.ran.map(|time| time.as_secs_f64()),
            usual,
            usual_seconds: facts.usual.map(|time| time.as_secs_f64()),
            waited,
            reason,
            submitted_by: facts.submitted_by,
            properties: facts.properties,
            own: facts.own,
            previous_id: row.previous_build.map(|build| build.0),
            previous_state: row.previous_state.clone(),
            good_id: row.good_build.map(|build| build.0),
            facts: lines,
            log: (!log.is_empty()).then_some(log),
            dbname: clean_line(&facts.dbname, 100),
            external_url: facts.external_url,
            unsubscribe: settings.unsubscribe.clone(),
        }
    }

    /// With everything there can be, and with the least: a template that works with these works.
    pub fn examples() -> [Single; 2] {
        let row = example();
        let settings = Mail {
            build_url: Some("https://builds.example.org/{id}".to_owned()),
            unsubscribe: Some("mailto:admin@example.org".to_owned()),
            ..Mail::default()
        };
        let branch = BTreeMap::from([("branch".to_owned(), Value::from("main"))]);
        let least = Facts {
            worker: None,
            started_at: None,
            finished_at: None,
            exit_code: None,
            term_signal: None,
            external_url: None,
            detail: None,
            ran: None,
            waited: None,
            usual: None,
            reason: None,
            submitted_by: "ann".to_owned(),
            properties: BTreeMap::new(),
            own: BTreeMap::new(),
            good_at: None,
            dbname: "builds".to_owned(),
            log: String::new(),
        };
        let (text, time) = (|| Some("text".to_owned()), Some(Timestamp::UNIX_EPOCH));
        let (minute, half) = (Some(Duration::from_secs(60)), Some(Duration::from_millis(500)));
        let most = Facts {
            worker: text(),
            started_at: time,
            finished_at: time,
            exit_code: Some(1),
            external_url: text(),
            detail: text(),
            ran: minute,
            waited: half,
            usual: minute,
            reason: text(),
            properties: branch.clone(),
            own: branch,
            good_at: time,
            log: "a line\n".to_owned(),
            ..least.clone()
        };
        let bare = Outgoing {
            event: "passed".to_owned(),
            verdict: "passed".to_owned(),
            previous_build: None,
            previous_state: None,
            good_build: None,
            ..row.clone()
        };
        [Single::new(&settings, &row, most), Single::new(&Mail::default(), &bare, least)]
    }
}

impl Digest {
    /// Of `rows`, at least one.
    pub fn new(settings: &Mail, rows: &[Outgoing], dbname: &str) -> Digest {
        let line = |row: &Outgoing| Line { build: Verdict::new(settings, row, None), at: at(row.created_at) };
        Digest {
            project: settings.project.clone(),
            per_hour: settings.per_hour,
            failed: rows.iter().filter(|row| row.verdict != "passed").count(),
            builds: rows.iter().map(line).collect(),
            dbname: clean_line(dbname, 100),
            unsubscribe: settings.unsubscribe.clone(),
        }
    }

    /// As [`Single::examples`].
    pub fn examples() -> [Digest; 2] {
        let settings = Mail { unsubscribe: Some("mailto:admin@example.org".to_owned()), ..Mail::default() };
        let bare = Outgoing { verdict: "passed".to_owned(), event: "passed".to_owned(), ..example() };
        [Digest::new(&settings, &[example()], "builds"), Digest::new(&Mail::default(), &[bare], "builds")]
    }
}

fn example() -> Outgoing {
    Outgoing {
        id: 1,
        build: BuildId(2),
        attempt: 1,
        builder: "linux".to_owned(),
        branch: String::new(),
        event: "problem".to_owned(),
        verdict: "failed".to_owned(),
        previous_build: Some(BuildId(1)),
        previous_state: Some("passed".to_owned()),
        good_build: Some(BuildId(1)),
        address: "ann@example.org".to_owned(),
        message_id: "2.1.problem".to_owned(),
        thread: "2.1.problem".to_owned(),
        created_at: Timestamp::UNIX_EPOCH,
        tries: 1,
    }
}

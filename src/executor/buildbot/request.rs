//! The build request of an attempt: asked for once, and found again.
//!
//! The master remembers nobody's questions: asked twice, it builds twice, and a question whose asker has gone is answered all the same. So
//! each request carries a token in its reason, which can be searched for; and what is not found is asked again only when the master has
//! answered for a while that it has no such thing.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::idle::Place;
use super::master::{Master, MasterError};
use super::rows::{Buildsets, RequestRow, Requests};
use crate::model::{BuildId, Job, clean_line};

/// How long the master must have answered that it has no request before it is taken at its word. It has needed 0.7 s under load.
pub const NO_PROOF: Duration = Duration::from_secs(10);

/// Of a reason, characters: with what the master adds and the token it must fit 256, and a longer one is refused by some databases.
const REASON: usize = 120;

/// What the attempts of one build put into the reasons of their requests. The time of the build's first attempt tells it from a build of
/// the same number in another database.
#[derive(Clone, Debug)]
pub struct Token {
    prefix: String,
}

impl Token {
    /// Of the build of `job`.
    pub fn of(job: &Job) -> Token {
        Token { prefix: format!("(br-{:x}-{}-", job.first_us, job.id.build) }
    }

    /// Of one attempt.
    pub fn attempt(&self, attempt: i32) -> String {
        format!("{}{attempt})", self.prefix)
    }

    /// Which attempt asked for a buildset with this reason.
    fn attempt_in(&self, reason: &str) -> Option<i32> {
        // The last one: a reason of people's own may quote others.
        let rest = reason[reason.rfind("(br-")?..].strip_prefix(&self.prefix)?;
        rest.split(')').next()?.parse().ok()
    }
}

/// The build, of whatever database, that a reason names.
pub fn named_build(reason: &str) -> Option<BuildId> {
    let token = &reason[reason.rfind("(br-")?..];
    token.split('-').nth(2)?.parse().ok().map(BuildId)
}

/// A request that carries a token of ours.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The attempt that asked.
    pub attempt: i32,
    /// What the master says.
    pub row: RequestRow,
}

/// All requests for a build, the first asked first.
///
/// # Errors
/// Unknown then.
pub async fn find(master: &Master, token: &Token) -> Result<Vec<Asked>, MasterError> {
    // Parentheses need not be escaped, and are no wildcards.
    let path = format!("buildsets?reason__contains={}&field=bsid&field=reason&order=bsid", token.prefix);
    let sets: Buildsets = master.get(&path).await?;
    let mut found = Vec::new();
    for set in sets.buildsets {
        let Some(attempt) = set.reason.as_deref().and_then(|reason| token.attempt_in(reason)) else { continue };
        let requests: Requests = master.get(&format!("buildrequests?buildsetid={}", set.bsid)).await?;
        found.extend(requests.buildrequests.into_iter().map(|row| Asked { attempt, row }));
    }
    Ok(found)
}

/// The state of one request.
///
/// # Errors
/// [`MasterError::NotFound`]: there is none.
pub async fn read(master: &Master, request: u64) -> Result<RequestRow, MasterError> {
    let gone = || MasterError::NotFound(format!("master `{}` no longer knows request {request}", master.name));
    match master.get::<Requests>(&format!("buildrequests/{request}")).await {
        Ok(rows) => rows.buildrequests.into_iter().next().ok_or_else(gone),
        Err(MasterError::NotFound(_)) => Err(gone()),
        Err(error) => Err(error),
    }
}

/// Stops a request, whether it waits or is being built. The master says yes to anything: look at the request afterwards.
///
/// # Errors
/// It was not, or may not have been, told.
pub async fn cancel(master: &Master, request: u64, why: &str) -> Result<(), MasterError> {
    let params = serde_json::json!({ "reason": why });
    master.call(&format!("buildrequests/{request}"), "cancel", &params).await.map(|_| ())
}

/// What the force scheduler is told.
///
/// # Errors
/// The build has properties that the scheduler does not take: it would drop them without a word.
pub fn parameters(job: &Job, builder: &str, scheduler: &str, place: &Place, token: &Token) -> Result<Value, String> {
    let row: Value = serde_json::from_str(&job.row).unwrap_or_default();
    let reason = row.get("reason").and_then(Value::as_str).map_or_else(|| format!("build {}", job.id), str::to_owned);
    let mut params = Map::new();
    let takes = |name: &str| place.fields.iter().find(|(field, _)| field == name);
    let mut unknown = Vec::new();
    for (name, text) in &job.properties {
        // These are ours.
        if ["reason", "username", "owner", "builderNames", "builderid"].contains(&name.as_str()) {
            return Err(format!("a property for a Buildbot builder cannot be called `{name}`"));
        }
        let Some((_, list)) = takes(name) else {
            unknown.push(format!("`{name}`"));
            continue;
        };
        // Where the row cannot be read by us, as PostgreSQL wrote it.
        let value = row.pointer(&format!("/properties/{}", name.replace('~', "~0").replace('/', "~1"))).cloned();
        match value.unwrap_or_else(|| Value::String(text.clone())) {
            Value::Null => continue,
            // As PostgreSQL has it: 3.10 is not 3.1, and a text parameter takes no number.
            Value::Number(_) => params.insert(name.clone(), Value::String(text.clone())),
            // Of a list it would keep the first entry alone.
            Value::Array(entries) if !list => {
                params.insert(name.clone(), Value::String(Value::Array(entries).to_string()))
            }
            value => params.insert(name.clone(), value),
        };
    }
    if !unknown.is_empty() {
        return Err(format!(
            "force scheduler `{scheduler}` does not take {}: declare it in master.cfg, for example util.StringParameter(name={})",
            unknown.join(", "),
            unknown[0].replace('`', "\"")
        ));
    }
    for (name, value) in [("buildreactor_build", job.id.build.0), ("buildreactor_attempt", i64::from(job.id.attempt))] {
        if takes(name).is_some() {
            params.insert(name.to_owned(), Value::String(value.to_string()));
        }
    }
    let reason = format!("{} {}", clean_line(&reason, REASON), token.attempt(job.id.attempt));
    params.insert("reason".to_owned(), Value::String(reason));
    // By name: by number the master would not look whether the scheduler starts this builder.
    params.insert("builderNames".to_owned(), Value::Array(vec![Value::String(builder.to_owned())]));
    Ok(Value::Object(params))
}

/// The request in the answer to a force call.
pub fn in_answer(answer: &Value) -> Option<u64> {
    answer.get(1)?.as_object()?.values().next()?.as_u64()
}

/// Since when a master answers that it has no such request.
#[derive(Debug, Default)]
pub struct Absent {
    since: Option<Instant>,
}

impl Absent {
    /// It has answered so once more. True: it is to be believed.
    pub fn again(&mut self) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() >= NO_PROOF
    }

    /// It did not answer.
    pub fn interrupted(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_build_and_attempt_and_is_told_from_others() {
        let token = Token { prefix: "(br-6a1-42-".to_owned() };
        let reason = format!("A build was forced by 'bot': see (br-6a1-42-x {}", token.attempt(10));
        assert_eq!(token.attempt_in(&reason), Some(10));
        assert_eq!(named_build(&reason), Some(BuildId(42)));
        assert_eq!(token.attempt_in("nightly (br-6a1-421-1)"), None);
        assert_eq!(token.attempt_in("like (br-6a1-42-1) (br-6a1-43-1)"), None);
        assert_eq!(token.attempt_in("nightly"), None);
        assert_eq!(named_build("nightly (br-"), None);
    }
}

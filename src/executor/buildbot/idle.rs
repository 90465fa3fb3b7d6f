//! Whether a builder of a master can take a build now, asked before anything is claimed.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::events::Events;
use super::master::{Master, MasterError};
use super::request::named_build;
use super::rows::{Builders, Buildsets, Field, Requests, Schedulers, Workers};
use crate::model::BuildId;

/// How long builder and scheduler are taken to be as they were seen; what has changed meanwhile is refused by the master.
const KNOWN: Duration = Duration::from_secs(30);

/// By builder and scheduler, and when each was looked up.
type Places = HashMap<(String, String), (Arc<Place>, Instant)>;

/// A master, what it tells by itself, and what is known of its configuration.
pub struct Farm {
    /// The master.
    pub master: Arc<Master>,
    /// Of its requests.
    pub events: Events,
    places: Mutex<Places>,
}

/// A builder there, and a force scheduler that starts it.
#[derive(Debug)]
pub struct Place {
    /// Its number.
    pub builderid: u64,
    /// What the scheduler takes, and whether as a list.
    pub fields: Vec<(String, bool)>,
    /// It has been seen that its requests can be found by their reason.
    pub findable: AtomicBool,
}

impl Farm {
    /// Of `master`.
    pub fn new(master: Arc<Master>) -> Farm {
        Farm { events: Events::new(Arc::clone(&master)), master, places: Mutex::default() }
    }

    fn places(&self) -> std::sync::MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks `builder` and `scheduler` up, at most every 30 s.
    ///
    /// # Errors
    /// The master does not answer, or does not have them.
    pub async fn place(&self, builder: &str, scheduler: &str) -> Result<Arc<Place>, MasterError> {
        let key = (builder.to_owned(), scheduler.to_owned());
        if let Some((place, at)) = self.places().get(&key)
            && at.elapsed() < KNOWN
        {
            return Ok(Arc::clone(place));
        }
        let name = &self.master.name;
        let (in_builder, in_scheduler) = (segment(builder), segment(scheduler));
        let absent = |error, what: String| match error {
            MasterError::NotFound(_) => MasterError::NotFound(what),
            other => other,
        };
        let found: Builders = self
            .master
            .get(&format!("builders/{in_builder}"))
            .await
            .map_err(|error| absent(error, format!("master `{name}` has no builder `{builder}`")))?;
        let row = found.builders.first().filter(|row| !row.masterids.is_empty());
        let Some(row) = row else {
            return Err(MasterError::NotFound(format!(
                "builder `{builder}` is no longer in the configuration of master `{name}`"
            )));
        };
        let schedulers: Schedulers = self
            .master
            .get(&format!("forceschedulers/{in_scheduler}"))
            .await
            .map_err(|error| absent(error, format!("master `{name}` has no force scheduler `{scheduler}`")))?;
        let Some(found) = schedulers.forceschedulers.first().filter(|found| found.enabled) else {
            return Err(MasterError::NotFound(format!("force scheduler `{scheduler}` of master `{name}` is disabled")));
        };
        if !found.builder_names.iter().any(|name| name == builder) {
            return Err(MasterError::NotFound(format!(
                "force scheduler `{scheduler}` of master `{name}` does not start builder `{builder}`: add it to its builderNames"
            )));
        }
        let place = Arc::new(Place {
            builderid: row.builderid,
            fields: flat(&found.all_fields),
            findable: AtomicBool::new(false),
        });
        self.places().insert(key, (Arc::clone(&place), Instant::now()));
        Ok(place)
    }

    /// Looked up anew next time: the master knows it otherwise.
    pub fn forget(&self, builder: &str, scheduler: &str) {
        self.places().remove(&(builder.to_owned(), scheduler.to_owned()));
    }

    /// Whether `builder` has a worker to build on, and fewer than `most` requests that wait or run, whoever asked for them. Not counted are
    /// those for one of `candidates`: left by an attempt that was lost, they will be adopted.
    ///
    /// # Errors
    /// Why not.
    pub async fn idle(
        &self,
        builder: &str,
        scheduler: &str,
        most: usize,
        candidates: &[BuildId],
    ) -> Result<(), MasterError> {
        let place = self.place(builder, scheduler).await?;
        let name = &self.master.name;
        let workers = format!("builders/{}/workers", place.builderid);
        let open = format!("builders/{}/buildrequests?complete=false", place.builderid);
        let (workers, open) = tokio::join!(self.master.get::<Workers>(&workers), self.master.get::<Requests>(&open));
        let workers = workers?.workers;
        let refused = |message| Err(MasterError::Refused { message, values: false });
        let connected = || workers.iter().filter(|worker| !worker.connected_to.is_empty());
        if connected().next().is_none() {
            return refused(format!("no worker of builder `{builder}` is connected to master `{name}`"));
        }
        if !connected().any(|worker| !worker.paused && !worker.graceful) {
            let names: Vec<&str> = connected().map(|worker| worker.name.as_str()).collect();
            return refused(format!(
                "each connected worker of builder `{builder}` on master `{name}` is paused or about to stop ({})",
                names.join(", ")
            ));
        }
        let open = open?.buildrequests;
        if open.len() < most {
            return Ok(());
        }
        let sets: Buildsets = self
            .master
            .get("buildsets?complete=false&reason__contains=(br-&field=bsid&field=reason&field=complete")
            .await?;
        let ours = |set: u64| {
            let reason = sets.buildsets.iter().find(|row| row.bsid == set).and_then(|row| row.reason.as_deref());
            reason.and_then(named_build).is_some_and(|build| candidates.contains(&build))
        };
        let counted = open.iter().filter(|request| !ours(request.buildsetid)).count();
        if counted < most {
            return Ok(());
        }
        Err(MasterError::Busy(format!(
            "builder `{builder}` on master `{name}` is busy ({counted} waiting or running there, {most} allowed)"
        )))
    }
}

/// The parameters in groups of groups.
fn flat(fields: &[Field]) -> Vec<(String, bool)> {
    let one = |field: &Field| {
        let own = field.full_name.clone().filter(|_| field.fields.is_empty()).map(|name| (name, field.multiple));
        own.into_iter().chain(flat(&field.fields)).collect::<Vec<_>>()
    };
    fields.iter().flat_map(one).collect()
}

/// A name as a part of a path.
pub fn segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parts_of_a_path() {
        assert_eq!(segment("linux-x86_64.a"), "linux-x86_64.a");
        assert_eq!(segment("a b/ü?"), "a%20b%2F%C3%BC%3F");
    }

    #[test]
    fn parameters_are_found_in_their_groups() {
        let fields: Vec<Field> = serde_json::from_str(
            r#"[{"fullName": null, "fields": [{"fullName": "reason", "multiple": false}, {"fullName": "app", "fields": [{"fullName": "app_branch"}]}]},
                {"fullName": "targets", "multiple": true}]"#,
        )
        .unwrap_or_default();
        let expected = [("reason", false), ("app_branch", false), ("targets", true)];
        assert_eq!(flat(&fields), expected.map(|(name, list)| (name.to_owned(), list)));
    }
}

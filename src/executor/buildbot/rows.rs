//! Rows of the API, as far as they are read here.

use serde::Deserialize;
use serde_json::Value;

/// A row of `builders`.
#[derive(Clone, Debug, Deserialize)]
pub struct BuilderRow {
    pub builderid: u64,
    /// Empty: it was removed from the configuration.
    pub masterids: Vec<u64>,
}

/// A row of `workers`.
#[derive(Clone, Debug, Deserialize)]
pub struct WorkerRow {
    pub name: String,
    #[serde(default)]
    pub connected_to: Vec<Value>,
    #[serde(default)]
    pub paused: bool,
    /// It leaves when its work is done.
    #[serde(default)]
    pub graceful: bool,
}

/// A row of `buildrequests`.
#[derive(Clone, Debug, Deserialize)]
pub struct RequestRow {
    pub buildrequestid: u64,
    pub buildsetid: u64,
    pub complete: bool,
    /// -1 until it is complete.
    pub results: i64,
}

/// A row of `buildsets`.
#[derive(Clone, Debug, Deserialize)]
pub struct BuildsetRow {
    pub bsid: u64,
    pub reason: Option<String>,
}

/// A row of `builds`. Times in seconds since 1970.
#[derive(Clone, Debug, Deserialize)]
pub struct BuildRow {
    pub buildid: u64,
    pub builderid: u64,
    pub number: u64,
    pub workerid: Option<u64>,
    pub complete: bool,
    pub started_at: Option<f64>,
    pub complete_at: Option<f64>,
    pub state_string: Option<String>,
}

/// A row of `steps`.
#[derive(Clone, Debug, Deserialize)]
pub struct StepRow {
    pub stepid: u64,
    pub number: u64,
    pub name: String,
    pub complete: bool,
    pub results: Option<i64>,
    pub started_at: Option<f64>,
    pub complete_at: Option<f64>,
    pub state_string: Option<String>,
}

/// A row of `logs`.
#[derive(Clone, Debug, Deserialize)]
pub struct LogRow {
    pub logid: u64,
    pub name: String,
    /// `s`: stdout and stderr, `t`: text, `h`: HTML.
    #[serde(rename = "type")]
    pub kind: String,
    pub num_lines: u64,
    pub complete: bool,
}

/// A row of `logchunks`.
#[derive(Clone, Debug, Deserialize)]
pub struct ChunkRow {
    pub content: String,
}

/// A row of `forceschedulers`.
#[derive(Clone, Debug, Deserialize)]
pub struct SchedulerRow {
    pub builder_names: Vec<String>,
    pub enabled: bool,
    pub all_fields: Vec<Field>,
}

/// A parameter of a force scheduler, or a group of them.
#[derive(Clone, Debug, Deserialize)]
pub struct Field {
    #[serde(rename = "fullName")]
    pub full_name: Option<String>,
    #[serde(default)]
    pub multiple: bool,
    #[serde(default)]
    pub fields: Vec<Field>,
}

/// Rows as the API answers: under the name of their kind.
macro_rules! answers {
    ($($name:ident { $field:ident: $row:ident })*) => {
        $(
            #[derive(Debug, Deserialize)]
            pub struct $name {
                pub $field: Vec<$row>,
            }
        )*
    };
}

answers! {
    Builders { builders: BuilderRow }
    Workers { workers: WorkerRow }
    Requests { buildrequests: RequestRow }
    Buildsets { buildsets: BuildsetRow }
    Builds { builds: BuildRow }
    Steps { steps: StepRow }
    Logs { logs: LogRow }
    Chunks { logchunks: ChunkRow }
    Schedulers { forceschedulers: SchedulerRow }
}

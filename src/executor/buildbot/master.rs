//! A Buildbot master, spoken to over its REST API (Buildbot's manual, "REST API"; what it does not say was found with version 4.3).

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{ACCEPT, COOKIE, HeaderMap, LOCATION, SET_COOKIE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, redirect};
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::task::TaskTracker;

use crate::config;
use crate::model::clean_line;
use crate::report::Chain;

/// How long a connection may take to open.
const CONNECT: Duration = Duration::from_secs(5);

/// How long an answer may take: a busy master has needed 0.7 s for a force call.
const ANSWER: Duration = Duration::from_secs(15);

/// How long an answer that nobody waits for any more is still taken. Buildbot 4.3 writes its answers from threads: a client that closes the
/// connection in the meantime can leave the master unable to take any.
const LATE: Duration = Duration::from_secs(300);

/// How long the kernel tries to deliver what was sent: well within the time from the end of a lease to the end of `grace`.
const UNDELIVERED: Duration = Duration::from_secs(8);

/// How many questions are under way at once: to a master that takes them and never answers as well.
const AT_ONCE: usize = 32;

/// An answer larger than this is not one of ours, bytes; and all that are being read at once hold no more.
const LARGEST: usize = 64 << 20;

/// An answer to a call, and one that is an error, are words and numbers: no larger than this, bytes.
const WORDS: usize = 1 << 20;

/// A master as `[buildbot.NAME]` has it.
pub struct Master {
    /// NAME.
    pub name: String,
    /// Without a slash at its end.
    url: String,
    user: Option<String>,
    password_file: Option<PathBuf>,
    client: Client,
    /// Of the last login. Held by hand: what a refusal sends along would replace a good one by an anonymous one.
    cookie: Mutex<Option<String>>,
    /// Questions under way, whether or not somebody still waits for the answer.
    exchanges: TaskTracker,
    room: Arc<Semaphore>,
    /// Bytes that answers may still take.
    bytes: Arc<Semaphore>,
}

/// What a master answers.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
    too_long: bool,
}

/// Why a master did not do what it was asked.
#[derive(Debug)]
pub enum MasterError {
    /// No connection: nothing was sent.
    NotReached(String),
    /// No answer in time, or one that tells nothing of what was done.
    Unreachable(String),
    /// The user cannot be logged in.
    Login(String),
    /// There is no such thing on the master.
    NotFound(String),
    /// It builds for others.
    Busy(String),
    /// It understood, and refused; nothing was done.
    Refused {
        /// For people.
        message: String,
        /// What was asked for is at fault, rather than who asked, or where.
        values: bool,
    },
}

impl fmt::Display for MasterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MasterError::NotReached(text)
            | MasterError::Unreachable(text)
            | MasterError::Login(text)
            | MasterError::NotFound(text)
            | MasterError::Busy(text) => f.write_str(text),
            MasterError::Refused { message, .. } => f.write_str(message),
        }
    }
}

impl MasterError {
    /// Whether it is the master that is away, rather than something that is wrong.
    pub fn is_outage(&self) -> bool {
        match self {
            MasterError::NotReached(_) | MasterError::Unreachable(_) => true,
            MasterError::Login(_) | MasterError::NotFound(_) | MasterError::Busy(_) | MasterError::Refused { .. } => {
                false
            }
        }
    }
}

type Result<T> = std::result::Result<T, MasterError>;

impl Master {
    /// Nothing is connected yet.
    ///
    /// # Errors
    /// The settings cannot be used; for people.
    pub fn new(name: &str, settings: &config::Buildbot) -> std::result::Result<Master, String> {
        let unusable = |error: &dyn std::error::Error| format!("[buildbot.{name}] cannot be used: {error}");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(file) = &settings.ca_file {
            let refused = |what: String| format!("[buildbot.{name}] ca_file: cannot use `{}`: {what}", file.display());
            let found = CertificateDer::pem_file_iter(file).map_err(|error| refused(error.to_string()))?;
            let mut some = false;
            for certificate in found {
                let certificate = certificate.map_err(|error| refused(error.to_string()))?;
                roots.add(certificate).map_err(|error| refused(error.to_string()))?;
                some = true;
            }
            if !some {
                return Err(refused("there is no certificate in it".to_owned()));
            }
        }
        let client = Client::builder()
            .tls_backend_preconfigured(builder.with_root_certificates(roots).with_no_client_auth())
            .redirect(redirect::Policy::none())
            // A build farm's master is named as it is to be reached.
            .no_proxy()
            .connect_timeout(CONNECT)
            .tcp_keepalive(Duration::from_secs(30))
            // What the network has kept for longer is not delivered any more.
            .tcp_user_timeout(UNDELIVERED)
            .build()
            .map_err(|error| unusable(&error))?;
        Ok(Master {
            name: name.to_owned(),
            url: settings.url.trim_end_matches('/').to_owned(),
            user: settings.user.clone(),
            password_file: settings.password_file.clone(),
            client,
            cookie: Mutex::default(),
            exchanges: TaskTracker::new(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
            bytes: Arc::new(Semaphore::new(LARGEST)),
        })
    }

    /// A page of the master's web interface, for people.
    pub fn page(&self, path: &str) -> String {
        format!("{}/#/{path}", self.url)
    }

    /// Whether passwords go over the network as they are.
    pub fn shows_password(&self) -> bool {
        let host = |url: &reqwest::Url| url.host_str().map(|host| host.trim_matches(['[', ']']).to_owned());
        let Ok(url) = self.url.parse::<reqwest::Url>() else { return false };
        let near = host(&url).is_some_and(|host| {
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        });
        self.user.is_some() && url.scheme() == "http" && !near
    }

    /// Reads `path` of the API, for example `builders/linux?field=masterids`.
    ///
    /// # Errors
    /// Nothing is changed by reading.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let url = format!("{}/api/v2/{path}", self.url);
        let Answer { status, headers, body, .. } = self.exchange(|client| client.get(&url), &|| true).await?;
        // Of the master's own words; what stands before it may say so while it restarts.
        if status == StatusCode::NOT_FOUND && serde_json::from_slice::<Value>(&body).is_ok() {
            return Err(MasterError::NotFound(format!("master `{}` has no {path}", self.name)));
        }
        if !status.is_success() {
            return Err(self.unexpected(status, &headers, &body));
        }
        serde_json::from_slice(&body).map_err(|error| {
            MasterError::Unreachable(format!(
                "what answers at [buildbot.{}] url is no Buildbot master of a version that is known here: {path}: {error}",
                self.name
            ))
        })
    }

    /// Calls `method` of `path`.
    ///
    /// # Errors
    /// [`MasterError::Refused`], [`MasterError::Login`], [`MasterError::NotFound`]: nothing was done. [`MasterError::Unreachable`]: it may
    /// have been done.
    ///
    /// # Cancel safety
    /// Once sent, it may be done although nobody hears the answer.
    pub async fn call(&self, path: &str, method: &str, params: &Value) -> Result<Value> {
        self.call_while(path, method, params, &|| true).await
    }

    /// [`Master::call`], which is not sent when `still` has become false: a login before it takes its time.
    ///
    /// # Errors
    /// [`MasterError::NotReached`]: it was not sent.
    ///
    /// # Cancel safety
    /// As there.
    pub async fn call_while(
        &self,
        path: &str,
        method: &str,
        params: &Value,
        still: &(dyn Fn() -> bool + Sync),
    ) -> Result<Value> {
        let url = format!("{}/api/v2/{path}", self.url);
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let Answer { status, body: answer, .. } = self.exchange(|client| client.post(&url).json(&body), still).await?;
        if answer.len() > WORDS {
            return Err(self.too_long());
        }
        if status.is_success()
            && let Ok(Value::Object(mut fields)) = serde_json::from_slice(&answer)
            && let Some(result) = fields.remove("result")
        {
            return Ok(result);
        }
        Err(self.refusal(status, &answer))
    }

    /// Opens a stream of events.
    ///
    /// # Errors
    /// There is none.
    pub async fn listen(&self, path: &str) -> Result<Response> {
        let url = format!("{}/sse/listen/{path}", self.url);
        let sent = tokio::time::timeout(ANSWER, self.request(&|client| client.get(&url)).send()).await;
        let response = sent.map_err(|_| self.silent())?.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.unexpected(response.status(), response.headers(), b""))
        }
    }

    /// What the master says of itself and of us, to anybody.
    ///
    /// # Errors
    /// It does not answer as a master.
    pub async fn about(&self) -> Result<About> {
        self.log_in_if_asked().await?;
        let url = format!("{}/config", self.url);
        let Answer { status, headers, body, .. } = self.send(self.request(&|client| client.get(&url))).await?;
        if !status.is_success() {
            return Err(self.unexpected(status, &headers, &body));
        }
        serde_json::from_slice(&body).map_err(|_| {
            MasterError::Unreachable(format!(
                "what answers at `{}` is no Buildbot master with a web interface",
                self.url
            ))
        })
    }

    /// Sends a request, logged in where a user is configured; once more after a new login when the master no longer knows us.
    async fn exchange(
        &self,
        request: impl Fn(&Client) -> RequestBuilder,
        still: &(dyn Fn() -> bool + Sync),
    ) -> Result<Answer> {
        let too_late = || MasterError::NotReached(format!("master `{}` was not asked in time", self.name));
        self.log_in_if_asked().await?;
        if !still() {
            return Err(too_late());
        }
        let answer = self.send(self.request(&request)).await?;
        if answer.status != StatusCode::FORBIDDEN || self.user.is_none() {
            return Ok(answer);
        }
        *self.cookie() = None;
        self.log_in_if_asked().await?;
        if !still() {
            return Err(too_late());
        }
        self.send(self.request(&request)).await
    }

    /// Sends a request in a task of its own, which takes the answer although the caller may be gone.
    async fn send(&self, request: RequestBuilder) -> Result<Answer> {
        let room = tokio::time::timeout(ANSWER, Arc::clone(&self.room).acquire_owned()).await;
        let Ok(Ok(room)) = room else {
            return Err(MasterError::NotReached(format!(
                "master `{}` has not answered {AT_ONCE} questions yet",
                self.name
            )));
        };
        let bytes = Arc::clone(&self.bytes);
        let whole = async move {
            let _room = room;
            let mut response = request.send().await?;
            let (status, headers, mut body) = (response.status(), response.headers().clone(), Vec::new());
            let most = if status.is_success() { LARGEST } else { WORDS };
            let (mut taken, mut too_long) = (None::<SemaphorePermit<'_>>, false);
            while let Some(part) = response.chunk().await? {
                let some = bytes.try_acquire_many(u32::try_from(part.len()).unwrap_or(u32::MAX));
                match (some, &mut taken) {
                    (Ok(some), taken) if !too_long && body.len() + part.len() <= most => {
                        body.extend_from_slice(&part);
                        match taken {
                            Some(taken) => taken.merge(some),
                            None => *taken = Some(some),
                        }
                    }
                    // What is too much is read all the same, and dropped.
                    _ => {
                        too_long = true;
                        (taken, body) = (None, Vec::new());
                    }
                }
            }
            Ok(Answer { status, headers, body, too_long })
        };
        let exchange = self.exchanges.spawn(tokio::time::timeout(LATE, whole));
        match tokio::time::timeout(ANSWER, exchange).await {
            Ok(Ok(Ok(Ok(answer)))) if answer.too_long => Err(self.too_long()),
            Ok(Ok(Ok(Ok(answer)))) => Ok(answer),
            Ok(Ok(Ok(Err(error)))) => Err(self.unreachable(&error)),
            Err(_) | Ok(Ok(Err(_)) | Err(_)) => Err(self.silent()),
        }
    }

    fn request(&self, request: &impl Fn(&Client) -> RequestBuilder) -> RequestBuilder {
        let request = request(&self.client).header(ACCEPT, "application/json");
        match &*self.cookie() {
            Some(cookie) => request.header(COOKIE, cookie),
            None => request,
        }
    }

    fn cookie(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.cookie.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn log_in_if_asked(&self) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        if self.cookie().is_some() {
            return Ok(());
        }
        let password = self.password().await.map_err(MasterError::Login)?;
        let url = format!("{}/auth/login", self.url);
        let answer = self.send(self.client.get(&url).basic_auth(user, Some(password))).await?;
        // Two cookies come back, the first of them anonymous. Their names differ with the site's path, and with TLS.
        let cookies = answer.headers.get_all(SET_COOKIE).iter().filter_map(|value| value.to_str().ok());
        let cookie = cookies.filter_map(|value| value.split(';').next()).rfind(|value| value.starts_with("TWISTED_"));
        match (answer.status, cookie) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                Err(MasterError::Login(format!("master `{}` refuses user `{user}`: wrong user or password", self.name)))
            }
            (status, Some(cookie)) if status.is_redirection() || status.is_success() => {
                let cookie = cookie.to_owned();
                *self.cookie() = Some(cookie);
                Ok(())
            }
            (StatusCode::NOT_FOUND | StatusCode::OK, None) => Err(MasterError::Login(format!(
                "master `{}` has no users to log in as: leave `user` out of [buildbot.{}]",
                self.name, self.name
            ))),
            (status, None) if status.is_redirection() => Err(MasterError::Login(format!(
                "master `{}` has no login with a password, it sends people to `{}`",
                self.name,
                elsewhere(&answer.headers).unwrap_or_default()
            ))),
            (status, _) => Err(self.unexpected(status, &answer.headers, &answer.body)),
        }
    }

    /// Read anew for each login.
    async fn password(&self) -> std::result::Result<String, String> {
        let name = &self.name;
        let file = match (&self.password_file, std::env::var_os("CREDENTIALS_DIRECTORY")) {
            (Some(file), _) => file.clone(),
            (None, Some(folder)) => PathBuf::from(folder).join(format!("buildbot_{name}_password")),
            (None, None) => {
                return Err(format!(
                    "[buildbot.{name}] user is set, but neither password_file nor a credential `buildbot_{name}_password`"
                ));
            }
        };
        let text = tokio::fs::read_to_string(&file).await;
        let text = text.map_err(|error| {
            format!("cannot read the password for master `{name}` in `{}`: {error}", file.display())
        })?;
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }

    fn too_long(&self) -> MasterError {
        MasterError::Unreachable(format!("an answer of master `{}` is too long", self.name))
    }

    fn silent(&self) -> MasterError {
        MasterError::Unreachable(format!("master `{}` does not answer within {} s", self.name, ANSWER.as_secs()))
    }

    fn unreachable(&self, error: &reqwest::Error) -> MasterError {
        let mut cause: &dyn std::error::Error = error;
        while let Some(next) = cause.source() {
            cause = next;
        }
        let text = format!("master `{}` cannot be reached at `{}`: {}", self.name, self.url, Chain(cause));
        if error.is_connect() { MasterError::NotReached(text) } else { MasterError::Unreachable(text) }
    }

    /// Perhaps not the master answers, but what stands before it, or something else altogether.
    fn unexpected(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> MasterError {
        let Master { name, url, .. } = self;
        let text = said(body);
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return self.forbidden(&text);
        }
        MasterError::Unreachable(match elsewhere(headers) {
            Some(place) if status.is_redirection() => format!(
                "`{url}` redirects to `{place}`, which is not followed: correct [buildbot.{name}] url, or let its API be reached without that"
            ),
            _ => format!("master `{name}` answers {status} at `{url}`: {text}"),
        })
    }

    fn forbidden(&self, text: &str) -> MasterError {
        let who = self.user.as_ref().map_or_else(
            || format!("without a user, which [buildbot.{}] could have", self.name),
            |user| format!("to user `{user}`"),
        );
        MasterError::Refused {
            message: format!("master `{}` does not allow it {who}: {text}", self.name),
            values: false,
        }
    }

    /// Of a call. What else it answers with 500 says nothing of what was done.
    fn refusal(&self, status: StatusCode, body: &[u8]) -> MasterError {
        const NOTHING_DONE: [&str; 2] = ["KeyError(", "AttributeError("];
        // A value of a kind that its parameter does not expect, or too long for a column of the master's database.
        const VALUES: [&str; 2] = ["TypeError(", "DataError("];
        let text = said(body);
        let name = &self.name;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.forbidden(&text),
            StatusCode::NOT_FOUND => MasterError::NotFound(format!("master `{name}`: {text}")),
            StatusCode::INTERNAL_SERVER_ERROR if NOTHING_DONE.iter().any(|known| text.contains(known)) => {
                MasterError::Refused { message: format!("master `{name}` refuses: {text}"), values: false }
            }
            StatusCode::INTERNAL_SERVER_ERROR if VALUES.iter().any(|known| text.contains(known)) => {
                MasterError::Refused { message: format!("master `{name}` refuses: {text}"), values: true }
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                MasterError::Unreachable(format!("master `{name}` answers {status}: {text}"))
            }
            status if status.is_client_error() => {
                MasterError::Refused { message: format!("master `{name}` refuses: {text}"), values: true }
            }
            status if status.is_success() => MasterError::Refused {
                message: format!("master `{name}` does not know the call: {text}"),
                values: false,
            },
            status => MasterError::Unreachable(format!("master `{name}` answers {status}: {text}")),
        }
    }
}

/// Where a redirect leads. Without the query: what stands there differs each time, and may be a secret.
fn elsewhere(headers: &HeaderMap) -> Option<String> {
    let place = headers.get(LOCATION)?.to_str().ok()?;
    Some(clean_line(place.split(['?', '#']).next()?, 200))
}

/// The message in an answer that is an error, in one line.
fn said(body: &[u8]) -> String {
    if body.trim_ascii_start().starts_with(b"<") {
        return "(a web page)".to_owned();
    }
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(fields)) => match fields.get("error") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(error)) => match error.get("message") {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => Value::Object(error.clone()).to_string(),
            },
            Some(_) | None => String::from_utf8_lossy(body).into_owned(),
        },
        Ok(_) | Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    clean_line(&text, 300)
}

/// `/config`.
#[derive(Debug, Deserialize)]
pub struct About {
    /// Name and version of what runs there.
    pub versions: Vec<(String, String)>,
    /// Who we are to it.
    #[serde(default)]
    pub user: Value,
}

impl About {
    /// Buildbot's version.
    pub fn version(&self) -> &str {
        self.versions.iter().find(|(name, _)| name == "Buildbot").map_or("unknown", |(_, version)| version)
    }
}

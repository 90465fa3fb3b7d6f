//! `[mail]`: its settings, what each must look like, and how they must fit together.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::Config;
use super::keys::Key;
use super::value::{DAY, Value, quoted};

/// `[mail]`: who sends what people have subscribed to. Nothing is sent without `url` or `dry_run`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Where mail is handed over. Default: `None`, this daemon sends none.
    pub url: Option<Server>,
    /// Sender of every mail, `Name <address>` or an address. Needed with `url` or `dry_run`, which is looked at when the daemon
    /// starts; what follows its @ ends every Message-ID.
    pub from: Option<String>,
    /// Where answers go, in the same form. Default: to `from`.
    pub reply_to: Option<String>,
    /// Stands in brackets before every subject: 1 to 63 characters. Default: `builds`.
    pub project: String,
    /// User name at the mail server. Default: `None`, no AUTH.
    pub user: Option<String>,
    /// File with the password or token, read anew for each connection. Default: `BUILDREACTOR_MAIL_PASSWORD` in the environment, then
    /// the file `$CREDENTIALS_DIRECTORY/mail_password` (systemd's LoadCredential).
    pub password_file: Option<PathBuf>,
    /// How to prove who we are. Default: password.
    pub auth: Auth,
    /// Whether a connection of `smtp://` goes on encrypted. Default: `None`, required with `user`, else opportunistic.
    pub starttls: Option<StartTls>,
    /// Certificate authorities to trust besides the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// How long each step of handing over a mail may take: 100 ms to 1 hour; five times as long for the reply to the whole
    /// message. Default: 1 minute.
    pub timeout: Duration,
    /// Folder with templates that stand in for the built-in ones of the same name. Default: none.
    pub templates: Option<PathBuf>,
    /// How many lines of the end of the log a mail shows: 0 to 1000. Default: 40.
    pub log_lines: u32,
    /// Address of a web page about a build, with `{id}` for its number. Default: none.
    pub build_url: Option<String>,
    /// `List-Unsubscribe`: a `mailto:`, `https:` or `http:` address. Default: none.
    pub unsubscribe: Option<String>,
    /// How many mails an address gets in an hour; what is above that goes into one of them: 1 to 10000. Default: 20.
    pub per_hour: u32,
    /// How many mails in an hour the `notify` of one submitter's builds may cause; what is above that is sent later: 1 to 100000. Default: 100.
    pub per_submitter: u32,
    /// How many mails in an hour `notify` may cause in all; what is above that is sent later: 1 to 1000000. Default: 1000.
    pub notify_per_hour: u32,
    /// Domains that mail may go to, their subdomains included. Default: all.
    pub domains: Vec<String>,
    /// Mails are written into this folder as .eml files instead of being sent; absolute. Default: `None`.
    pub dry_run: Option<PathBuf>,
}

/// Who takes our mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A mail server.
    Smtp {
        /// Name or address.
        host: String,
        /// Default: 25, with TLS 465.
        port: u16,
        /// TLS from the first byte (`smtps://`).
        tls: bool,
    },
    /// A program that is called like sendmail; absolute.
    Sendmail(PathBuf),
}

/// `mail.auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// PLAIN or LOGIN, what the server offers.
    Password,
    /// XOAUTH2: the password is a bearer token.
    Xoauth2,
}

/// `mail.starttls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartTls {
    /// No mail without it; the certificate must be good.
    Required,
    /// Where the server offers it, whatever its certificate: who can forge that could also hide the offer.
    Opportunistic,
    /// Not even then.
    Never,
}

impl Mail {
    /// Whether this daemon sends mail.
    pub fn is_on(&self) -> bool {
        self.url.is_some() || self.dry_run.is_some()
    }

    /// What `starttls` comes to.
    pub fn starttls(&self) -> StartTls {
        let default = if self.user.is_some() { StartTls::Required } else { StartTls::Opportunistic };
        self.starttls.unwrap_or(default)
    }

    /// Whether the password would be readable on the network.
    pub(super) fn shows_password(&self) -> bool {
        let Some(Server::Smtp { host, tls: false, .. }) = &self.url else { return false };
        let near = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        self.user.is_some() && self.starttls() != StartTls::Required && !near
    }
}

impl Default for Mail {
    fn default() -> Self {
        Self {
            url: None,
            from: None,
            reply_to: None,
            project: "builds".to_owned(),
            user: None,
            password_file: None,
            auth: Auth::Password,
            starttls: None,
            ca_file: None,
            timeout: Duration::from_secs(60),
            templates: None,
            log_lines: 40,
            build_url: None,
            unsubscribe: None,
            per_hour: 20,
            per_submitter: 100,
            notify_per_hour: 1000,
            domains: Vec::new(),
            dry_run: None,
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Server::Smtp { host, port, tls } => write!(f, "{}://{host}:{port}", if *tls { "smtps" } else { "smtp" }),
            Server::Sendmail(program) => write!(f, "sendmail:{}", program.display()),
        }
    }
}

/// `smtp://HOST[:PORT]`, `smtps://HOST[:PORT]` or `sendmail:/PATH`.
fn server(text: &str) -> Result<Server, String> {
    if let Some(path) = text.strip_prefix("sendmail:") {
        let path = PathBuf::from(path);
        return if path.is_absolute() {
            Ok(Server::Sendmail(path))
        } else {
            Err("the path is not absolute".to_owned())
        };
    }
    let (tls, rest) = match (text.strip_prefix("smtp://"), text.strip_prefix("smtps://")) {
        (Some(rest), _) => (false, rest),
        (None, Some(rest)) => (true, rest),
        (None, None) => return Err("it is no such address".to_owned()),
    };
    // Never shown: it may be a password.
    if rest.contains('@') {
        return Err("user and password are keys of their own".to_owned());
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().map_err(|_| format!("{} is no port", quoted(port)))?)
        }
        _ => (rest, if tls { 465 } else { 25 }),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || !host.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:".contains(c)) {
        return Err(format!("{} is no host", quoted(host)));
    }
    Ok(Server::Smtp { host: host.to_owned(), port, tls })
}

/// One of several words.
fn word<T: Copy>(value: &Value<'_>, words: &[(&str, T)]) -> Result<T, String> {
    let text = value.text()?;
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| format!("{} is given", quoted(&text)))
}

fn project(value: &Value<'_>) -> Result<String, String> {
    let text = value.text()?;
    if text.chars().count() > 63 { Err("it is too long".to_owned()) } else { Ok(text) }
}

fn build_url(value: &Value<'_>) -> Result<String, String> {
    let text = value.text()?;
    let web = text.starts_with("https://") || text.starts_with("http://");
    if web && text.contains("{id}") { Ok(text) } else { Err(format!("{} is no such address", quoted(&text))) }
}

fn unsubscribe(value: &Value<'_>) -> Result<String, String> {
    let text = value.text()?;
    let known = ["mailto:", "https://", "http://"].iter().any(|scheme| text.starts_with(scheme));
    let plain = text.is_ascii() && !text.contains(['<', '>', ' ']);
    if known && plain { Ok(text) } else { Err(format!("{} is no such address", quoted(&text))) }
}

const fn key(
    name: &'static str,
    must: &'static str,
    example: &'static str,
    set: fn(&mut Config, &Value<'_>) -> Result<(), String>,
) -> Key {
    Key { section: "mail", name, must, example, set }
}

const SENDER: &str = "a mail address, with or without a name";

pub(super) static KEYS: &[Key] = &[
    key(
        "url",
        "`smtp://HOST`, `smtps://HOST`, either with `:PORT`, or `sendmail:/PATH`",
        "\"smtp://localhost\"",
        |c, v| v.text().and_then(|text| server(&text)).map(|url| c.mail.url = Some(url)),
    ),
    key("from", SENDER, "\"builds@example.org\"", |c, v| v.text().map(|from| c.mail.from = Some(from))),
    key("reply_to", SENDER, "\"team@example.org\"", |c, v| v.text().map(|to| c.mail.reply_to = Some(to))),
    key("project", "1 to 63 characters", "\"example\"", |c, v| project(v).map(|name| c.mail.project = name)),
    key("user", "a user name", "\"builds\"", |c, v| v.text().map(|user| c.mail.user = Some(user))),
    key("password_file", "an absolute path", "\"/etc/buildreactor/mail_password\"", |c, v| {
        v.absolute_path().map(|path| c.mail.password_file = Some(path))
    }),
    key("auth", "`password` (PLAIN or LOGIN) or `xoauth2`", "\"password\"", |c, v| {
        word(v, &[("password", Auth::Password), ("xoauth2", Auth::Xoauth2)]).map(|auth| c.mail.auth = auth)
    }),
    key("starttls", "`required`, `opportunistic` or `never`", "\"required\"", |c, v| {
        use StartTls::{Never, Opportunistic, Required};
        let words = [("required", Required), ("opportunistic", Opportunistic), ("never", Never)];
        word(v, &words).map(|starttls| c.mail.starttls = Some(starttls))
    }),
    key("ca_file", "an absolute path", "\"/etc/ssl/our-ca.pem\"", |c, v| {
        v.absolute_path().map(|path| c.mail.ca_file = Some(path))
    }),
    key("timeout", "a duration with a unit, from 100 ms to 1 hour", "\"1 minute\"", |c, v| {
        v.duration(Duration::from_millis(100)..=DAY / 24).map(|time| c.mail.timeout = time)
    }),
    key("templates", "an absolute path", "\"/etc/buildreactor/mail\"", |c, v| {
        v.absolute_path().map(|path| c.mail.templates = Some(path))
    }),
    key("log_lines", "a whole number from 0 to 1000", "40", |c, v| {
        v.count(0..=1000).map(|lines| c.mail.log_lines = lines)
    }),
    key(
        "build_url",
        "an address that begins with `https://` or `http://`, with `{id}` in it",
        "\"https://builds.example.org/{id}\"",
        |c, v| build_url(v).map(|url| c.mail.build_url = Some(url)),
    ),
    key(
        "unsubscribe",
        "an address that begins with `mailto:`, `https://` or `http://`, in ASCII",
        "\"mailto:admin@example.org?subject=unsubscribe\"",
        |c, v| unsubscribe(v).map(|address| c.mail.unsubscribe = Some(address)),
    ),
    key("per_hour", "a whole number from 1 to 10000", "20", |c, v| {
        v.count(1..=10_000).map(|count| c.mail.per_hour = count)
    }),
    key("per_submitter", "a whole number from 1 to 100000", "100", |c, v| {
        v.count(1..=100_000).map(|count| c.mail.per_submitter = count)
    }),
    key("notify_per_hour", "a whole number from 1 to 1000000", "1000", |c, v| {
        v.count(1..=1_000_000).map(|count| c.mail.notify_per_hour = count)
    }),
    key("domains", "a list of domains", "[\"example.org\"]", |c, v| v.list().map(|list| c.mail.domains = list)),
    key("dry_run", "an absolute path", "\"/var/tmp/mails\"", |c, v| {
        v.absolute_path().map(|path| c.mail.dry_run = Some(path))
    }),
];

//! Mails: what they say, how they look, how they are handed over. When, and to whom, is in the outbox (`database/mail.rs`); the
//! daemon's postman carries them from there to here.

mod content;
mod message;
mod smtp;
mod templates;
mod text;
mod wire;

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub use self::message::Letter;
use self::message::Writer;
use self::smtp::Smtp;
use self::templates::Templates;
pub use self::text::clean_line;
use crate::config::{Mail, Server};
use crate::database::mail::{Claimed, Facts, Limits};
use crate::report::Chain;

/// A mail that cannot be written, or settings that cannot work.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct MailError(String);

impl MailError {
    fn new(text: impl Into<String>) -> MailError {
        MailError(text.into())
    }
}

/// Why a letter was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It never will be, in the server's words.
    Refused(String),
    /// Not now, in the server's words.
    NotNow(String),
    /// The server cannot be reached, breaks off, says nothing in time or does not let us in: this concerns all mails.
    Unreachable(String),
}

impl Failure {
    /// What happened.
    pub fn words(&self) -> &str {
        match self {
            Failure::Refused(words) | Failure::NotNow(words) | Failure::Unreachable(words) => words,
        }
    }
}

/// Writes letters and hands them over; keeps its connection between two of them.
pub struct Mailer {
    settings: Mail,
    writer: Writer,
    way: Way,
}

enum Way {
    Smtp(Box<Smtp>),
    Sendmail(std::path::PathBuf),
    Folder(std::path::PathBuf),
}

impl Mailer {
    /// A mailer for `settings`, which are [on](Mail::is_on). Connects to nothing yet.
    ///
    /// # Errors
    /// An address, a template or a certificate cannot be used.
    pub fn new(settings: &Mail) -> Result<Mailer, MailError> {
        let templates = Templates::load(settings.templates.as_deref())?;
        let writer = Writer::new(settings, templates)?;
        let way = match (&settings.dry_run, &settings.url) {
            (Some(folder), _) => Way::Folder(folder.clone()),
            (None, Some(Server::Sendmail(program))) => Way::Sendmail(program.clone()),
            (None, Some(Server::Smtp { host, port, tls })) => {
                Way::Smtp(Box::new(Smtp::new(settings, host, *port, *tls)?))
            }
            (None, None) => return Err(MailError::new("neither [mail] url nor dry_run is set")),
        };
        Ok(Mailer { settings: settings.clone(), writer, way })
    }

    /// Where letters go, for messages.
    pub fn describe(&self) -> String {
        match (&self.way, &self.settings.url) {
            (Way::Folder(folder), _) => format!("files in `{}`", folder.display()),
            (Way::Smtp(_) | Way::Sendmail(_), url) => url.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Whether what it needs on this machine is there now: a password, the program, the folder.
    ///
    /// # Errors
    /// What is not; for people.
    pub async fn look(&self) -> Result<(), String> {
        match &self.way {
            Way::Smtp(smtp) => smtp.look().await,
            Way::Sendmail(program) => {
                let there = tokio::fs::metadata(program).await;
                let there =
                    there.map_err(|error| format!("cannot call `{}` ([mail] url): {error}", program.display()))?;
                if !there.is_file() || there.permissions().mode() & 0o111 == 0 {
                    return Err(format!("`{}` ([mail] url) is no program", program.display()));
                }
                Ok(())
            }
            // Made when it is needed.
            Way::Folder(_) => Ok(()),
        }
    }

    /// Longer than handing over one letter takes: connecting, STARTTLS, AUTH and three commands, and the reply to the message.
    pub fn longest(&self) -> Duration {
        self.settings.timeout * 15 + Duration::from_secs(30)
    }

    /// How many mails go out within an hour.
    pub fn limits(&self) -> Limits {
        let Mail { per_hour, per_submitter, notify_per_hour, .. } = self.settings;
        Limits { address: per_hour, submitter: per_submitter, notified: notify_per_hour }
    }

    /// Whether `[mail] domains` lets mail go to this address.
    pub fn allows(&self, address: &str) -> bool {
        let domain = address.rsplit('@').next().unwrap_or_default().to_lowercase();
        let inside = |allowed: &String| {
            let allowed = allowed.to_lowercase();
            domain.strip_suffix(&allowed).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        self.settings.domains.is_empty() || self.settings.domains.iter().any(inside)
    }

    /// The letter for what was claimed. `facts`: of its first row.
    ///
    /// # Errors
    /// The address is none, or a template of somebody's own does not work with it.
    pub fn write(&self, claimed: &Claimed, facts: Facts) -> Result<Letter, MailError> {
        self.writer.write(&self.settings, claimed, facts)
    }

    /// A letter that says that mail works.
    ///
    /// # Errors
    /// `address` is none.
    pub fn write_test(&self, address: &str) -> Result<Letter, MailError> {
        self.writer.write_test(&self.settings, address)
    }

    /// Hands a letter over.
    ///
    /// # Errors
    /// It was not taken, or whether it was is not known.
    ///
    /// # Cancel safety
    /// Not: it may have been taken.
    pub async fn deliver(&mut self, letter: &Letter) -> Result<(), Failure> {
        match &mut self.way {
            Way::Smtp(smtp) => smtp.deliver(letter).await,
            Way::Sendmail(program) => sendmail(program, self.settings.timeout * 5, letter).await,
            Way::Folder(folder) => {
                let unusable = |error| Failure::Unreachable(format!("cannot write to `{}`: {error}", folder.display()));
                write_file(folder, letter).await.map_err(unusable)
            }
        }
    }

    /// Ends the connection, if there is one.
    pub async fn rest(&mut self) {
        if let Way::Smtp(smtp) = &mut self.way {
            smtp.quit().await;
        }
    }
}

/// A file appears with all it holds.
async fn write_file(folder: &Path, letter: &Letter) -> std::io::Result<()> {
    tokio::fs::create_dir_all(folder).await?;
    let name: String =
        letter.id.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }).collect();
    let half = folder.join(format!(".{name}"));
    tokio::fs::write(&half, &letter.bytes).await?;
    tokio::fs::rename(half, folder.join(format!("{name}.eml"))).await
}

/// Exit codes are those of sysexits(3).
async fn sendmail(program: &Path, limit: Duration, letter: &Letter) -> Result<(), Failure> {
    /// Bytes of its stderr that are kept.
    const LONGEST: u64 = 64 << 10;
    let unreachable = |what: String| Failure::Unreachable(format!("`{}`: {what}", program.display()));
    let mut command = tokio::process::Command::new(program);
    crate::config::without_secrets(command.as_std_mut());
    let mut child = command
        .args(["-i", "-f", letter.from.as_ref(), "--", letter.to.as_ref()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| unreachable(error.to_string()))?;
    let (input, errors) = (child.stdin.take(), child.stderr.take());
    // Lines as on this machine: not every sendmail takes the network's.
    let text = String::from_utf8_lossy(&letter.bytes).replace("\r\n", "\n");
    let work = async {
        let write = async {
            if let Some(mut input) = input
                && let Err(error) = input.write_all(text.as_bytes()).await
                // It has ended early; its exit code says why.
                && error.kind() != ErrorKind::BrokenPipe
            {
                tracing::debug!("cannot write to `{}`: {error}", program.display());
            }
        };
        let read = async {
            let mut said = Vec::new();
            if let Some(mut errors) = errors {
                // The first words say why; all others are read, so that the program can go on, and dropped.
                (&mut errors).take(LONGEST).read_to_end(&mut said).await?;
                tokio::io::copy(&mut errors, &mut tokio::io::sink()).await?;
            }
            Ok::<_, std::io::Error>((said, child.wait().await?))
        };
        // Both at once, or a chatty program and we would wait for each other.
        tokio::join!(write, read).1
    };
    let (said, status) = match tokio::time::timeout(limit, work).await {
        Ok(output) => output.map_err(|error| unreachable(error.to_string()))?,
        Err(_) => return Err(unreachable(format!("did not end within {} s", limit.as_secs()))),
    };
    if status.success() {
        return Ok(());
    }
    let said = clean_line(&String::from_utf8_lossy(&said), 1000);
    let words = format!("{status}: {said}");
    Err(match status.code() {
        // EX_DATAERR, EX_NOUSER, EX_NOHOST, EX_UNAVAILABLE, EX_NOPERM
        Some(65 | 67 | 68 | 69 | 77) => Failure::Refused(words),
        Some(75) => Failure::NotNow(words),
        _ => unreachable(words),
    })
}

/// An error of lettre with its causes, on one line.
fn words(error: &(dyn std::error::Error + 'static)) -> String {
    clean_line(&Chain(error).to_string(), 1000)
}

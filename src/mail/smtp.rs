//! The dialogue with a mail server, step by step: lettre speaks the protocol; each step has its time here.
//!
//! Not lettre's pooled transport: it has no limit on the time of a reply, and when one is put around it, it takes the connection back
//! into its pool in the middle of a dialogue. The late reply to one letter would then count for the next.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{AsyncSmtpConnection, Certificate, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail as MailFrom, Quit, Rcpt, Rset};
use lettre::transport::smtp::extension::{ClientId, Extension, MailBodyParameter, MailParameter};
use rustls::ClientConfig;
use tokio::time::Instant;

use super::{Failure, Letter, MailError, wire, words};
use crate::config::{Auth, Mail, StartTls};

/// Servers end a connection after so many letters, or when it was idle for long; so do we, before them.
const LETTERS: u32 = 50;
const IDLE: Duration = Duration::from_secs(20);

/// Who knows the password where no file is named.
const PASSWORD: &str = "BUILDREACTOR_MAIL_PASSWORD";

pub(super) struct Smtp {
    host: String,
    port: u16,
    /// From the first byte.
    tls: Option<Arc<ClientConfig>>,
    starttls: StartTls,
    /// For STARTTLS.
    parameters: TlsParameters,
    user: Option<String>,
    password_file: Option<PathBuf>,
    auth: Auth,
    hello: ClientId,
    step: Duration,
    open: Option<Open>,
}

/// A connection that is ready for a letter.
struct Open {
    connection: AsyncSmtpConnection,
    letters: u32,
    used: Instant,
}

/// What goes wrong in a step, before it is known whom it concerns.
enum Trouble {
    Smtp(Error),
    /// No connection.
    Connect(std::io::Error),
    /// No reply in time.
    Silence(&'static str, Duration),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        Trouble::Smtp(error)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Trouble {
        Trouble::Connect(error)
    }
}

impl Trouble {
    fn words(&self) -> String {
        match self {
            Trouble::Smtp(error) => words(error),
            Trouble::Connect(error) => words(error),
            Trouble::Silence(step, time) => format!("no reply to {step} within {} s", time.as_secs_f64()),
        }
    }
}

impl Smtp {
    pub(super) fn new(settings: &Mail, host: &str, port: u16, tls: bool) -> Result<Smtp, MailError> {
        let starttls = settings.starttls();
        let mut parameters = TlsParameters::builder(host.to_owned());
        let unusable = |what: String| {
            let file = settings.ca_file.as_deref().unwrap_or(Path::new(""));
            MailError::new(format!("cannot use `{}` ([mail] ca_file): {what}", file.display()))
        };
        if let Some(file) = &settings.ca_file {
            let pem = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
            parameters =
                parameters.add_root_certificate(Certificate::from_pem(&pem).map_err(|error| unusable(words(&error)))?);
        }
        // Who could forge a certificate could as well hide the offer of STARTTLS.
        let any = !tls && starttls == StartTls::Opportunistic;
        let parameters = parameters
            .dangerous_accept_invalid_certs(any)
            .dangerous_accept_invalid_hostnames(any)
            .build()
            .map_err(|error| MailError::new(format!("cannot prepare TLS for mail: {}", words(&error))))?;
        let tls = match tls {
            true => Some(wire::tls(settings.ca_file.as_deref()).map_err(unusable)?),
            false => None,
        };
        Ok(Smtp {
            host: host.to_owned(),
            port,
            tls,
            starttls,
            parameters,
            user: settings.user.clone(),
            password_file: settings.password_file.clone(),
            auth: settings.auth,
            hello: ClientId::default(),
            step: settings.timeout,
            open: None,
        })
    }

    /// Dropped in the middle, the connection is gone: it is put back only after a reply to the whole letter.
    pub(super) async fn deliver(&mut self, letter: &Letter) -> Result<(), Failure> {
        let mut open = match self.reuse().await {
            Some(open) => open,
            None => self.connect().await?,
        };
        match self.send(&mut open.connection, letter).await {
            Ok(()) => {
                self.keep(open);
                Ok(())
            }
            Err(Trouble::Smtp(error)) if error.is_permanent() => {
                self.keep(open);
                Err(Failure::Refused(words(&error)))
            }
            // 421: the server is about to close the connection.
            Err(Trouble::Smtp(error))
                if error.is_transient() && error.status().is_none_or(|code| code.to_string() != "421") =>
            {
                self.keep(open);
                Err(Failure::NotNow(words(&error)))
            }
            // Ours: what the server cannot take, such as an address that is not ASCII.
            Err(Trouble::Smtp(error)) if error.is_client() => Err(Failure::Refused(words(&error))),
            Err(trouble) => Err(Failure::Unreachable(trouble.words())),
        }
    }

    pub(super) async fn quit(&mut self) {
        if let Some(mut open) = self.open.take()
            && let Err(trouble) = within("QUIT", self.step, open.connection.command(Quit)).await
        {
            tracing::debug!("a mail server did not say goodbye: {}", trouble.words());
        }
    }

    fn keep(&mut self, open: Open) {
        let open = Open { letters: open.letters + 1, used: Instant::now(), ..open };
        self.open = (open.letters < LETTERS).then_some(open);
    }

    /// The open connection, if it still works.
    async fn reuse(&mut self) -> Option<Open> {
        let mut open = self.open.take().filter(|open| open.used.elapsed() < IDLE)?;
        // Also clears what a refused letter has left.
        let alive = within("RSET", self.step, open.connection.command(Rset)).await;
        alive.is_ok().then_some(open)
    }

    async fn connect(&self) -> Result<Open, Failure> {
        let place = format!("{}:{}", self.host, self.port);
        let failed = |trouble: Trouble| Failure::Unreachable(format!("{place}: {}", trouble.words()));
        let step = self.step;
        let connecting = async {
            let stream = wire::connect(&self.host, self.port, self.tls.as_ref()).await?;
            Ok::<_, Trouble>(AsyncSmtpConnection::connect_with_transport(stream, &self.hello).await?)
        };
        let mut connection = within("the connection, its greeting or EHLO", step, connecting).await.map_err(failed)?;
        let wanted = match self.starttls {
            _ if self.tls.is_some() => false,
            StartTls::Required => true,
            StartTls::Opportunistic => connection.can_starttls(),
            StartTls::Never => false,
        };
        if wanted && !connection.can_starttls() {
            return Err(Failure::Unreachable(format!(
                "{place}: it offers no STARTTLS, which [mail] starttls requires"
            )));
        }
        if wanted {
            let upgrade = connection.starttls(self.parameters.clone(), &self.hello);
            within("STARTTLS", step, upgrade).await.map_err(failed)?;
        }
        if let Some(user) = &self.user {
            let password = self.password().await.map_err(Failure::Unreachable)?;
            let mechanisms: &[Mechanism] = match self.auth {
                Auth::Password => &[Mechanism::Plain, Mechanism::Login],
                Auth::Xoauth2 => &[Mechanism::Xoauth2],
            };
            let credentials = Credentials::new(user.clone(), password);
            within("AUTH", step, connection.auth(mechanisms, &credentials)).await.map_err(failed)?;
        }
        Ok(Open { connection, letters: 0, used: Instant::now() })
    }

    async fn send(&self, connection: &mut AsyncSmtpConnection, letter: &Letter) -> Result<(), Trouble> {
        let mut options = Vec::new();
        let ascii = [&letter.from, &letter.to].iter().all(|address| AsRef::<str>::as_ref(*address).is_ascii());
        // Headers are encoded, but for addresses that are not ASCII.
        if !ascii {
            options.push(MailParameter::SmtpUtfEight);
        }
        if !letter.bytes.is_ascii() && connection.server_info().supports_feature(Extension::EightBitMime) {
            options.push(MailParameter::Body(MailBodyParameter::EightBitMime));
        }
        let step = self.step;
        within("MAIL FROM", step, connection.command(MailFrom::new(Some(letter.from.clone()), options))).await?;
        within("RCPT TO", step, connection.command(Rcpt::new(letter.to.clone(), Vec::new()))).await?;
        within("DATA", step, connection.command(Data)).await?;
        // It has the whole letter now and may scan it. Giving up means that it may come twice.
        within("the message", step * 5, connection.message(&letter.bytes)).await?;
        Ok(())
    }

    /// Whether there is a password for a user who needs one.
    pub(super) async fn look(&self) -> Result<(), String> {
        if self.user.is_some() {
            self.password().await?;
        }
        Ok(())
    }

    /// Read anew for each connection: files with tokens are renewed.
    async fn password(&self) -> Result<String, String> {
        let file = match &self.password_file {
            Some(file) => file.clone(),
            None => match (std::env::var(PASSWORD), std::env::var_os("CREDENTIALS_DIRECTORY")) {
                (Ok(password), _) => return Ok(password),
                (Err(_), Some(folder)) => PathBuf::from(folder).join("mail_password"),
                (Err(_), None) => {
                    return Err(format!(
                        "[mail] user is set, but neither password_file nor {PASSWORD} nor a credential `mail_password`"
                    ));
                }
            },
        };
        let text = tokio::fs::read_to_string(&file).await;
        let text =
            text.map_err(|error| format!("cannot read the password for mail in `{}`: {error}", file.display()))?;
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }
}

async fn within<T, E: Into<Trouble>>(
    step: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(_) => Err(Trouble::Silence(step, limit)),
    }
}

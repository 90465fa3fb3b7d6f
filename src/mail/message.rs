//! Letters: headers and MIME, by lettre.

use std::time::SystemTime;

use jiff::Timestamp;
use lettre::Address;
use lettre::message::header::{ContentType, HeaderName, HeaderValue};
use lettre::message::{Mailbox, Message, MessageBuilder, MultiPart, SinglePart};

use super::MailError;
use super::content::{Digest, Single};
use super::templates::{Templates, Texts};
use super::text::clean_line;
use crate::config::Mail;
use crate::database::mail::{Claimed, Facts, Outgoing};

/// A letter ready to go.
#[derive(Debug, Clone)]
pub struct Letter {
    /// Envelope sender.
    pub from: Address,
    /// Envelope recipient.
    pub to: Address,
    /// Message-ID up to the @.
    pub id: String,
    /// The whole message, lines as on the network.
    pub bytes: Vec<u8>,
}

/// What all letters share.
pub(super) struct Writer {
    from: Mailbox,
    reply_to: Option<Mailbox>,
    /// What follows the @ of a Message-ID.
    domain: String,
    templates: Templates,
}

impl Writer {
    pub(super) fn new(settings: &Mail, templates: Templates) -> Result<Writer, MailError> {
        const MISSING: &str =
            "[mail] from is missing: the sender of all mails, for example from = \"builds@example.org\"";
        let from = settings.from.as_deref().ok_or_else(|| MailError::new(MISSING))?;
        let from = mailbox("from", from)?;
        let domain: String = from
            .email
            .domain()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '-' })
            .collect();
        let reply_to = settings.reply_to.as_deref().map(|text| mailbox("reply_to", text)).transpose()?;
        Ok(Writer { from, reply_to, domain, templates })
    }

    pub(super) fn write(&self, settings: &Mail, claimed: &Claimed, facts: Facts) -> Result<Letter, MailError> {
        let row = claimed.rows.first().ok_or_else(|| MailError::new("nothing to write about"))?;
        let (id, texts) = if claimed.digest {
            let digest = Digest::new(settings, &claimed.rows, &facts.dbname);
            (format!("{}.digest", row.message_id), self.templates.digest(&digest)?)
        } else {
            (row.message_id.clone(), self.templates.single(&Single::new(settings, row, facts))?)
        };
        let mut builder = self.builder(settings, &row.address, &id, row.created_at)?;
        builder = builder.raw_header(header("List-Id", self.list_id(settings, row, claimed.digest)));
        if !claimed.digest {
            if row.thread != row.message_id {
                let root = self.message_id(&row.thread);
                builder = builder.in_reply_to(root.clone()).references(root);
            }
            builder = builder
                .raw_header(header("X-Buildreactor-Builder", row.builder.clone()))
                .raw_header(header("X-Buildreactor-Build", row.build.0.to_string()))
                .raw_header(header("X-Buildreactor-State", row.verdict.clone()));
            if let Some(previous) = &row.previous_state {
                builder = builder.raw_header(header("X-Buildreactor-Previous", previous.clone()));
            }
        }
        self.finish(builder, &row.address, id, texts)
    }

    pub(super) fn write_test(&self, settings: &Mail, to: &str) -> Result<Letter, MailError> {
        let now = Timestamp::now();
        let id = format!("test.{}", now.as_microsecond());
        let text = format!("Mail of buildreactor, project {}, arrives here.", settings.project);
        let texts = Texts {
            subject: format!("[{}] a test", settings.project),
            plain: format!("{text}\n"),
            html: "<!DOCTYPE html><html><body><p>Mail of buildreactor arrives here.</p></body></html>".to_owned(),
        };
        let builder = self.builder(settings, to, &id, now)?;
        self.finish(builder, to, id, texts)
    }

    fn builder(&self, settings: &Mail, to: &str, id: &str, date: Timestamp) -> Result<MessageBuilder, MailError> {
        let mut builder = Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, address(to)?))
            // When the build ended, however late it is sent, and the same when it is sent again.
            .date(SystemTime::from(date))
            .message_id(Some(self.message_id(id)))
            // RFC 3834: no answers from machines.
            .raw_header(header("Auto-Submitted", "auto-generated".to_owned()));
        if let Some(reply_to) = &self.reply_to {
            builder = builder.reply_to(reply_to.clone());
        }
        if let Some(address) = &settings.unsubscribe {
            builder = builder.raw_header(header("List-Unsubscribe", format!("<{address}>")));
        }
        Ok(builder)
    }

    fn finish(&self, builder: MessageBuilder, to: &str, id: String, texts: Texts) -> Result<Letter, MailError> {
        let part = |kind: ContentType, text: String| SinglePart::builder().header(kind).body(text);
        let body = MultiPart::alternative()
            .singlepart(part(ContentType::TEXT_PLAIN, texts.plain))
            .singlepart(part(ContentType::TEXT_HTML, texts.html));
        let message = builder
            .subject(clean_line(&texts.subject, 250))
            .multipart(body)
            .map_err(|error| MailError::new(format!("the mail cannot be written: {error}")))?;
        Ok(Letter { from: self.from.email.clone(), to: address(to)?, id, bytes: message.formatted() })
    }

    fn message_id(&self, left: &str) -> String {
        format!("<{left}@{}>", self.domain)
    }

    /// RFC 2919: a name for people, and one that never changes.
    fn list_id(&self, settings: &Mail, row: &Outgoing, digest: bool) -> String {
        let label = |text: &str| -> String {
            text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect()
        };
        let project = label(&settings.project);
        if digest {
            return format!("<{project}.{}>", self.domain);
        }
        format!("{} <{}.{project}.{}>", row.builder, label(&row.builder), self.domain)
    }
}

fn header(name: &'static str, value: String) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), clean_line(&value, 900))
}

fn mailbox(key: &str, text: &str) -> Result<Mailbox, MailError> {
    text.parse().map_err(|error| {
        MailError::new(format!("`{}` ([mail] {key}) is no mail address: {error}", clean_line(text, 100)))
    })
}

fn address(text: &str) -> Result<Address, MailError> {
    text.parse().map_err(|error| MailError::new(format!("`{}` is no mail address: {error}", clean_line(text, 300))))
}

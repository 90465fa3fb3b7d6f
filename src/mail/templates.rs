//! The texts of mails: minijinja templates, built in, each to be replaced by a file of the same name.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;

use super::MailError;
use super::content::{Digest, Single};

/// Name and text of each.
const BUILT_IN: [(&str, &str); 7] = [
    ("subject.txt", include_str!("templates/subject.txt")),
    ("body.txt", include_str!("templates/body.txt")),
    // What the two pages share: head, style, footer.
    ("base.html", include_str!("templates/base.html")),
    ("body.html", include_str!("templates/body.html")),
    ("digest_subject.txt", include_str!("templates/digest_subject.txt")),
    ("digest.txt", include_str!("templates/digest.txt")),
    ("digest.html", include_str!("templates/digest.html")),
];

/// Templates that have proved to work.
#[derive(Debug)]
pub struct Templates(Environment<'static>);

/// The three texts of a mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Texts {
    /// One line.
    pub subject: String,
    /// For people without HTML.
    pub plain: String,
    /// For the others.
    pub html: String,
}

impl Templates {
    /// The built-in ones, and those in `folder` instead of them. Files there that do not end in .txt or .html are left alone.
    ///
    /// # Errors
    /// The folder cannot be read, has a template of an unknown name, or one that does not work: each is tried with two examples.
    pub fn load(folder: Option<&Path>) -> Result<Templates, MailError> {
        let mut env = Environment::new();
        // A misspelt name is an error, not an empty place in a mail.
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        let blocks = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(blocks.map_err(|error| wrong("subject.txt", &error))?);
        env.set_auto_escape_callback(|name| if name.ends_with(".html") { AutoEscape::Html } else { AutoEscape::None });
        for (name, text) in BUILT_IN {
            env.add_template(name, text).map_err(|error| wrong(name, &error))?;
        }
        if let Some(folder) = folder {
            let unreadable = |error: std::io::Error| {
                MailError::new(format!("cannot read `{}` ([mail] templates): {error}", folder.display()))
            };
            for entry in std::fs::read_dir(folder).map_err(unreadable)? {
                let name = entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned();
                if !name.ends_with(".txt") && !name.ends_with(".html") {
                    continue;
                }
                if !BUILT_IN.iter().any(|(known, _)| *known == name) {
                    let known = BUILT_IN.map(|(known, _)| known).join("`, `");
                    let folder = folder.display();
                    return Err(MailError::new(format!("`{folder}/{name}` is no template; known are `{known}`")));
                }
                let text = std::fs::read_to_string(folder.join(&name)).map_err(unreadable)?;
                env.add_template_owned(name.clone(), text).map_err(|error| wrong(&name, &error))?;
            }
        }
        let templates = Templates(env);
        for single in Single::examples() {
            templates.single(&single)?;
        }
        for digest in Digest::examples() {
            templates.digest(&digest)?;
        }
        Ok(templates)
    }

    /// The mail about one build.
    ///
    /// # Errors
    /// A template of somebody's own does not work with it.
    pub fn single(&self, single: &Single) -> Result<Texts, MailError> {
        self.texts(["subject.txt", "body.txt", "body.html"], single)
    }

    /// The mail about many.
    ///
    /// # Errors
    /// As [`Templates::single`].
    pub fn digest(&self, digest: &Digest) -> Result<Texts, MailError> {
        self.texts(["digest_subject.txt", "digest.txt", "digest.html"], digest)
    }

    fn texts(&self, names: [&str; 3], values: &impl Serialize) -> Result<Texts, MailError> {
        let render = |name: &str| {
            let template = self.0.get_template(name).map_err(|error| wrong(name, &error))?;
            // Its error may be in base.html.
            let culprit = |error: minijinja::Error| wrong(error.name().unwrap_or(name), &error);
            template.render(minijinja::value::Serde(values)).map_err(culprit)
        };
        let [subject, plain, html] = names;
        Ok(Texts { subject: render(subject)?, plain: render(plain)?, html: render(html)? })
    }
}

fn wrong(name: &str, error: &minijinja::Error) -> MailError {
    // With the line, and what stands behind it.
    let text = crate::report::Chain(error).to_string();
    MailError::new(format!("the mail template `{name}` does not work: {text}"))
}

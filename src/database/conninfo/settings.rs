//! Settings with their origins, before anybody knows what they mean.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::error::{ConnInfoError, Origin, quoted_list};
use super::keys::{self, KEYS, Treatment};

#[derive(Clone)]
struct Setting {
    value: String,
    origin: Origin,
}

/// What was written, by key. An empty value hides what lower sources say and means the default,
/// as in libpq.
#[derive(Clone, Default)]
pub(super) struct Settings(BTreeMap<&'static str, Setting>);

impl Settings {
    /// Stores a setting over an earlier one.
    pub(super) fn put(&mut self, key: &str, value: String, origin: Origin) -> Result<(), ConnInfoError> {
        let Some(known) = keys::find(key) else {
            return Err(ConnInfoError::UnknownKey { origin, near: keys::near(key), key: key.to_owned() });
        };
        self.0.insert(known.name, Setting { value, origin });
        Ok(())
    }

    /// Stores a setting that no higher source has set.
    pub(super) fn put_below(&mut self, key: &str, value: String, origin: Origin) -> Result<(), ConnInfoError> {
        if self.0.contains_key(key) {
            return Ok(());
        }
        self.put(key, value, origin)
    }

    /// Stores what the environment says where nobody else said anything.
    pub(super) fn put_variables(&mut self, env: &dyn Fn(&str) -> Option<String>) -> Result<(), ConnInfoError> {
        for key in KEYS {
            if let Some(name) = key.variable
                && let Some(value) = env(name).filter(|value| !value.is_empty())
            {
                self.put_below(key.name, value, Origin::Variable(name))?;
            }
        }
        Ok(())
    }

    /// The value, unless it is empty.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key).map(|setting| setting.value.as_str());
        value.filter(|value| !value.is_empty())
    }

    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let setting = self.0.remove(key);
        setting.map(|s| s.value).filter(|value| !value.is_empty())
    }

    pub(super) fn origin(&self, key: &str) -> Origin {
        let setting = self.0.get(key);
        setting.map_or(Origin::Default, |setting| setting.origin.clone())
    }

    pub(super) fn bad(&self, key: &'static str, problem: impl Into<String>) -> ConnInfoError {
        ConnInfoError::BadValue { origin: self.origin(key), key, problem: problem.into() }
    }

    /// A whole number; `None` where it is not set.
    pub(super) fn number<T: FromStr>(&self, key: &'static str) -> Result<Option<T>, ConnInfoError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let parsed = value.trim().parse();
        parsed.map(Some).map_err(|_| self.bad(key, "must be a whole number that fits 32 bits"))
    }

    /// A positive whole number. Zero and less mean the default, as in libpq.
    pub(super) fn positive(&self, key: &'static str) -> Result<Option<u32>, ConnInfoError> {
        let number = self.number::<i32>(key)?;
        Ok(number.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0))
    }

    /// One of some words; `None` where it is not set.
    pub(super) fn choice<T: Copy>(&self, key: &'static str, words: &[(&str, T)]) -> Result<Option<T>, ConnInfoError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                let known = quoted_list(&known, " or ");
                Err(self.bad(key, format!("is `{value}`, but must be {known}")))
            }
        }
    }

    /// Refuses what libpq would honour and this program cannot, unless it asks for nothing.
    /// `applies` says of a key whether it has any effect on this connection.
    pub(super) fn refuse_unsupported(&self, applies: impl Fn(&str) -> bool) -> Result<(), ConnInfoError> {
        for key in KEYS {
            if let Treatment::Refuse(harmless, reason) = key.treatment
                && let Some(value) = self.get(key.name)
                && !harmless.iter().any(|word| word.eq_ignore_ascii_case(value))
                && applies(key.name)
            {
                return Err(ConnInfoError::Unsupported { origin: self.origin(key.name), key: key.name, reason });
            }
        }
        Ok(())
    }
}

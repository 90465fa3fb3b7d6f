//! One value, from the file or from a variable, read as the type its key wants.
//!
//! An error here says only what is wrong; the key's table entry says what it must look like.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use jiff::{SpanRelativeTo, fmt::friendly::SpanParser};
use toml::de::DeValue;

/// A day in a duration is always 24 hours.
pub(super) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const SIZE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// A value not yet read.
pub(super) enum Value<'a> {
    File(&'a DeValue<'a>),
    Variable(&'a str),
}

impl Value<'_> {
    /// Text of at least one character and no control characters. The error never shows it.
    pub(super) fn text(&self) -> Result<String, String> {
        let text = match self {
            Value::File(DeValue::String(text)) => text.as_ref(),
            Value::File(other) => return Err(wrong_type(other)),
            Value::Variable(text) => text,
        };
        if text.trim().is_empty() {
            return Err("it is empty".to_owned());
        }
        if text.contains(char::is_control) {
            return Err("it holds a control character".to_owned());
        }
        if matches!(self, Value::Variable(_)) && text.contains(char::REPLACEMENT_CHARACTER) {
            return Err("it is not UTF-8".to_owned());
        }
        Ok(text.to_owned())
    }

    /// A worker's name.
    pub(super) fn name(&self) -> Result<String, String> {
        let name = self.text()?;
        if is_worker_name(&name) { Ok(name) } else { Err(format!("{} is no such name", quoted(&name))) }
    }

    pub(super) fn absolute_path(&self) -> Result<PathBuf, String> {
        let text = self.text()?;
        let path = PathBuf::from(&text);
        if path.is_absolute() { Ok(path) } else { Err(format!("{} is not absolute", quoted(&text))) }
    }

    pub(super) fn socket_address(&self) -> Result<SocketAddr, String> {
        let text = self.text()?;
        let address = text.parse::<SocketAddr>().ok().filter(|address| address.port() > 0);
        address.ok_or_else(|| format!("{} is no such address", quoted(&text)))
    }

    pub(super) fn count(&self, range: RangeInclusive<u32>) -> Result<u32, String> {
        let number = match self {
            Value::File(DeValue::Integer(i)) => i128::from_str_radix(i.as_str(), i.radix()).ok(),
            Value::File(other) => return Err(wrong_type(other)),
            Value::Variable(text) => match text.trim().parse::<i128>() {
                Ok(number) => Some(number),
                Err(_) => return Err(format!("{} is not a whole number", quoted(text))),
            },
        };
        number
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| range.contains(number))
            .ok_or_else(|| format!("{} is out of range", self.shown()))
    }

    pub(super) fn boolean(&self) -> Result<bool, String> {
        match self {
            Value::File(DeValue::Boolean(yes)) => Ok(*yes),
            Value::File(other) => Err(wrong_type(other)),
            Value::Variable("true") => Ok(true),
            Value::Variable("false") => Ok(false),
            Value::Variable(text) => Err(format!("{} is given", quoted(text))),
        }
    }

    /// A list of texts without spaces around them; in a variable, separated by commas.
    pub(super) fn list(&self) -> Result<Vec<String>, String> {
        match self {
            Value::File(DeValue::Array(items)) => items
                .iter()
                .map(|item| match Value::File(item.get_ref()).text() {
                    Ok(text) if text.contains(',') => Err(format!("{} holds a comma", quoted(&text))),
                    Ok(text) => Ok(text.trim().to_owned()),
                    Err(wrong) => Err(format!("in an entry, {wrong}")),
                })
                .collect(),
            Value::File(other) => Err(wrong_type(other)),
            Value::Variable("") => Ok(Vec::new()),
            Value::Variable(text) => text
                .split(',')
                .map(|item| {
                    let wrong = |wrong| format!("in an entry, {wrong}");
                    Value::Variable(item.trim()).text().map_err(wrong)
                })
                .collect(),
        }
    }

    /// A list of builder patterns, not empty.
    pub(super) fn patterns(&self) -> Result<Vec<String>, String> {
        let list = self.list()?;
        if list.is_empty() {
            return Err("the list is empty, so no build would ever run here".to_owned());
        }
        let known = |c: char| c.is_alphanumeric() || "._-*?".contains(c);
        match list.iter().find(|pattern| !pattern.chars().all(known)) {
            Some(pattern) => Err(format!("{} matches no builder's name", quoted(pattern))),
            None => Ok(list),
        }
    }

    pub(super) fn duration(&self, range: RangeInclusive<Duration>) -> Result<Duration, String> {
        let text = self.with_unit()?;
        let span = SpanParser::new().parse_span(&text).map_err(|_| format!("{} is not a duration", quoted(&text)))?;
        // Fails for months and years, which have no fixed length.
        let duration = span
            .to_duration(SpanRelativeTo::days_are_24_hours())
            .map_err(|_| format!("{} has no fixed length", quoted(&text)))?;
        Duration::try_from(duration)
            .ok()
            .filter(|duration| range.contains(duration))
            .ok_or_else(|| format!("{} is out of range", quoted(&text)))
    }

    /// Bytes; no more than fits into PostgreSQL's `bigint`. Zero needs no unit.
    pub(super) fn size(&self, minimum: u64) -> Result<u64, String> {
        let text = match self {
            Value::File(DeValue::Integer(i)) if i.as_str() == "0" => "0 B".to_owned(),
            Value::File(DeValue::String(text)) if text == "0" => "0 B".to_owned(),
            Value::Variable("0") => "0 B".to_owned(),
            Value::File(_) | Value::Variable(_) => self.with_unit()?,
        };
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[digits.len()..];
        let known = SIZE_UNITS.iter().find(|(name, _)| *name == unit);
        let (Some((_, factor)), Ok(number)) = (known, digits.trim().parse::<u128>()) else {
            return Err(format!("{} is not a size", quoted(&text)));
        };
        number
            .checked_mul(u128::from(*factor))
            .and_then(|bytes| i64::try_from(bytes).ok())
            .and_then(|bytes| u64::try_from(bytes).ok())
            .filter(|bytes| *bytes >= minimum)
            .ok_or_else(|| format!("{} is out of range", self.shown()))
    }

    /// The text of a number with a unit; a bare number is told so.
    fn with_unit(&self) -> Result<String, String> {
        let text = match self {
            Value::File(DeValue::Integer(_) | DeValue::Float(_)) => None,
            Value::File(_) | Value::Variable(_) => Some(self.text()?),
        };
        text.map(|text| text.trim().to_owned())
            .filter(|text| text.parse::<f64>().is_err())
            .ok_or_else(|| format!("{} has no unit", self.shown()))
    }

    fn shown(&self) -> String {
        match self {
            Value::File(DeValue::String(text)) => quoted(text),
            Value::File(DeValue::Integer(i)) => quoted(&i.to_string()),
            Value::File(DeValue::Float(f)) => quoted(&f.to_string()),
            Value::File(other) => wrong_type(other),
            Value::Variable(text) => quoted(text),
        }
    }
}

/// Whether a worker may be called so.
pub(super) fn is_worker_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=63).contains(&name.len()) && name.chars().all(allowed) && name.chars().any(|character| character != '.')
}

/// "a boolean is given", in TOML's words.
pub(super) fn wrong_type(value: &DeValue<'_>) -> String {
    let article = match value {
        DeValue::Integer(_) | DeValue::Array(_) => "an",
        DeValue::String(_) | DeValue::Float(_) | DeValue::Boolean(_) => "a",
        DeValue::Datetime(_) | DeValue::Table(_) => "a",
    };
    format!("{article} {} is given", value.type_str())
}

/// Somebody's text in back-quotes, as part of a message.
pub(super) fn quoted(text: &str) -> String {
    format!("`{}`", one_line(text))
}

/// Somebody's text made fit for a message of one line: no control characters, at most 60
/// characters.
pub(super) fn one_line(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = text.chars().take(60).map(clean).collect();
    if text.chars().nth(60).is_some() {
        shown.push_str("...");
    }
    shown
}

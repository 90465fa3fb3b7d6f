//! Text for a database whose encoding is not UTF8: what the encoding lacks becomes `?`, everything else is kept. Texts that come from outside
//! (output of builds, details, words of mail servers and masters) pass through here on their way into the database; whatever came out of the
//! database fits into it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::{Database, Result, answered, queries};

/// Characters asked about at once.
const AT_ONCE: usize = 5000;
/// Characters remembered.
const MOST: usize = 100_000;

/// What is known of a database's encoding.
#[derive(Default)]
pub(super) struct Charset {
    /// Some characters are missing. A database in SQL_ASCII takes any bytes.
    narrow: OnceCell<bool>,
    /// Which characters outside ASCII fit.
    known: Mutex<HashMap<char, bool>>,
}

impl Database {
    /// `text` with `?` for each character that the database's encoding lacks.
    ///
    /// # Errors
    /// The database could not be asked about characters that are not known yet.
    pub(super) async fn fit<'a>(&self, text: &'a str) -> Result<Cow<'a, str>> {
        const STEP: &str = "look which characters the database can hold";
        if text.is_ascii() || !self.is_narrow().await? {
            return Ok(Cow::Borrowed(text));
        }
        let mut fits: HashMap<char, bool> = HashMap::new();
        let mut unknown = BTreeSet::new();
        {
            let known = self.charset.known.lock().unwrap_or_else(PoisonError::into_inner);
            for c in text.chars().filter(|c| !c.is_ascii()) {
                match known.get(&c) {
                    Some(known) => drop(fits.insert(c, *known)),
                    None => drop(unknown.insert(c)),
                }
            }
        }
        let unknown: Vec<char> = unknown.into_iter().collect();
        for some in unknown.chunks(AT_ONCE) {
            let bytes: Vec<Vec<u8>> = some.iter().map(|c| c.to_string().into_bytes()).collect();
            let session = self.work().await?;
            let row = answered(STEP, session.query_one(&*self.schema.sql(queries::CHARACTERS_FIT), &[&bytes])).await?;
            fits.extend(some.iter().copied().zip(row.get::<_, Vec<bool>>(0)));
        }
        if !unknown.is_empty() {
            let mut known = self.charset.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() > MOST {
                known.clear();
            }
            known.extend(unknown.iter().filter_map(|c| Some((*c, *fits.get(c)?))));
        }
        let fitting = |c: char| if c.is_ascii() || fits.get(&c).copied().unwrap_or(false) { c } else { '?' };
        Ok(Cow::Owned(text.chars().map(fitting).collect()))
    }

    /// [`Database::fit`], without anything but ASCII where the database cannot be asked.
    pub(super) async fn fit_or_ascii<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.fit(text).await {
            Ok(text) => text,
            Err(error) => {
                tracing::debug!(error = %crate::report::Chain(&error), "text is stored without what is not ASCII");
                Cow::Owned(text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect())
            }
        }
    }

    /// [`Database::fit`] for what may be missing.
    ///
    /// # Errors
    /// As there.
    pub(super) async fn fit_optional<'a>(&self, text: Option<&'a str>) -> Result<Option<Cow<'a, str>>> {
        match text {
            Some(text) => self.fit(text).await.map(Some),
            None => Ok(None),
        }
    }

    /// [`Database::fit`] for JSON.
    ///
    /// # Errors
    /// As there.
    pub(super) async fn fit_json(&self, value: &(impl serde::Serialize + Sync)) -> Result<serde_json::Value> {
        let unexpected = |error: serde_json::Error| super::DatabaseError::Unexpected {
            step: "write JSON for the database",
            what: error.to_string(),
        };
        let text = serde_json::to_string(value).map_err(unexpected)?;
        serde_json::from_str(&self.fit(&text).await?).map_err(unexpected)
    }

    async fn is_narrow(&self) -> Result<bool> {
        const STEP: &str = "look up the database's encoding";
        const SQL: &str = "SELECT pg_catalog.getdatabaseencoding()::text";
        let ask = async || {
            let session = self.work().await?;
            let row = answered(STEP, session.query_one(SQL, &[])).await?;
            Ok(!["UTF8", "SQL_ASCII"].contains(&row.get::<_, &str>(0)))
        };
        self.charset.narrow.get_or_try_init(ask).await.copied()
    }
}

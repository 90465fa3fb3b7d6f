//! The schema of our tables, and our statements with its name in them.
//!
//! Statements in `sql/` call it `farm`. Every session of ours has `search_path = pg_catalog, pg_temp`, so no operator or function that
//! somebody has put into a schema of the search_path can take the place of one of PostgreSQL's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

/// The table that shows where `migrate` has been.
pub(super) const HISTORY: &str = "build_schema_history";

/// How the files in `sql/` write it, with the dot behind.
const WRITTEN: &str = "farm.";

/// The search_path of all our sessions.
pub(super) const PATH: &str = "SET search_path = pg_catalog, pg_temp";

/// Before the first statement that reads: SERIALIZABLE READ ONLY DEFERRABLE, by a role's own settings, would wait for other people.
const AT_ONCE: &str = "SET default_transaction_isolation = 'read committed'; SET default_transaction_deferrable = off";

/// The same until the end of a transaction.
pub(super) const PATH_OF_TRANSACTION: &str = "SET LOCAL search_path = pg_catalog, pg_temp";

/// The schemas of the session's own search_path, in order. All names are PostgreSQL's own, because the path may hold other people's.
const SCHEMAS: &str = "SELECT pg_catalog.current_schemas(false)::pg_catalog.text[]";

/// The first of the schemas $1 that has our tables, and whether there is one; else the first of all.
const FIRST: &str = "SELECT s.name FROM unnest($1::text[]) WITH ORDINALITY AS s(name, place) \
    JOIN pg_namespace n ON n.nspname = s.name LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = $2 AND c.relkind = 'r' \
    ORDER BY c.oid IS NULL, s.place LIMIT 1";

/// The schema of our tables. Found once for each [`super::Database`], by its first session.
#[derive(Clone, Debug, Default)]
pub(super) struct Schema(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    name: OnceLock<String>,
    /// The search_path that the person's session came with, where it was asked for.
    path: OnceLock<Vec<String>>,
    texts: Mutex<HashMap<&'static str, Arc<str>>>,
}

impl Schema {
    /// The schema of the session's search_path that comes first, whether it has tables of ours or not: where `migrate` works. Gives the
    /// session the search_path of all our sessions. `None`: the path names no schema that exists.
    ///
    /// # Errors
    /// No answer; the session should be given up.
    pub(super) async fn first(client: &Client) -> Result<Option<Schema>, Error> {
        client.batch_execute(AT_ONCE).await?;
        let names: Vec<String> = client.query_typed_one(SCHEMAS, &[]).await?.get(0);
        client.batch_execute(PATH).await?;
        Ok(names.first().cloned().map(|name| {
            let schema = Schema::default();
            let _new = (schema.0.name.set(name), schema.0.path.set(names));
            schema
        }))
    }

    /// Finds it without a change to the session's settings, which may be those of a pooler's session that others use next.
    ///
    /// # Errors
    /// No answer; the session should be given up.
    pub(super) async fn look(client: &Client) -> Result<Schema, Error> {
        let schema = Schema::default();
        client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED").await?;
        let names: Vec<String> = client.query_typed_one(SCHEMAS, &[]).await?.get(0);
        client.batch_execute(PATH_OF_TRANSACTION).await?;
        schema.find(client, names).await?;
        client.batch_execute("COMMIT").await?;
        Ok(schema)
    }

    /// Finds it, unless it is known, and gives the session the search_path of all our sessions. Comes first in a session.
    ///
    /// # Errors
    /// No answer; the session should be given up. A search_path that names no schema is no error here: statements fail then.
    pub(super) async fn enter(&self, client: &Client) -> Result<(), Error> {
        if self.0.name.get().is_some() {
            return client.batch_execute(PATH).await;
        }
        client.batch_execute(AT_ONCE).await?;
        let names: Vec<String> = client.query_typed_one(SCHEMAS, &[]).await?.get(0);
        client.batch_execute(PATH).await?;
        self.find(client, names).await
    }

    /// Picks it from the schemas `names`, in a session that has the search_path of ours.
    async fn find(&self, client: &Client, names: Vec<String>) -> Result<(), Error> {
        let rows = client.query_typed(FIRST, &[(&names, Type::TEXT_ARRAY), (&HISTORY, Type::TEXT)]).await?;
        if let Some(row) = rows.first() {
            // Another session may have found it at the same time.
            let _known = self.0.name.set(row.get("name"));
        }
        let _known = self.0.path.set(names);
        Ok(())
    }

    /// Its name; `None`: no session has found one.
    pub(super) fn name(&self) -> Option<&str> {
        self.0.name.get().map(String::as_str)
    }

    /// The schemas of the search_path that the person's session came with, this one, and `more`: where names of a person's own are found.
    pub(super) fn path_of_people(&self, more: &str) -> String {
        let mut names: Vec<&str> = self.0.path.get().into_iter().flatten().map(String::as_str).collect();
        for name in [self.name().unwrap_or_default(), more] {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.into_iter().map(quoted).chain(["pg_temp".to_owned()]).collect::<Vec<_>>().join(", ")
    }

    /// Sets the search_path that the statements of migrations need.
    pub(super) fn path_of_migrations(&self) -> String {
        format!("SET search_path = {}, pg_temp", quoted(self.name().unwrap_or_default()))
    }

    /// `statement` as the database is to have it. Before [`Schema::enter`] the schema is called `public`.
    pub(super) fn sql(&self, statement: &'static str) -> Arc<str> {
        let Some(name) = self.name() else { return with_schema(statement, "public").into() };
        let mut texts = self.0.texts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(texts.entry(statement).or_insert_with(|| with_schema(statement, name).into()))
    }
}

/// `text` with the name of `schema` wherever it says `farm.`
pub(super) fn with_schema(text: &str, schema: &str) -> String {
    let quoted = format!("{}.", quoted(schema));
    let mut out = String::with_capacity(text.len() + 256);
    let mut rest = text;
    while let Some(at) = rest.find(WRITTEN) {
        let inside_a_name =
            rest[..at].chars().next_back().or_else(|| out.chars().next_back()).is_some_and(is_part_of_a_name);
        out.push_str(&rest[..at]);
        out.push_str(if inside_a_name { WRITTEN } else { &quoted });
        rest = &rest[at + WRITTEN.len()..];
    }
    out.push_str(rest);
    out
}

fn is_part_of_a_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.' | '$' | '"')
}

/// A name as an identifier that may stand anywhere: in a literal, between dollar signs, in a comment.
pub(super) fn quoted(name: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | ' ');
    if name.chars().all(is_plain) {
        return format!("\"{name}\"");
    }
    let escaped: String =
        name.chars().map(|c| if is_plain(c) { c.to_string() } else { format!("\\+{:06X}", u32::from(c)) }).collect();
    format!("U&\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_gets_the_name_of_the_schema_where_it_says_farm() {
        assert_eq!(with_schema("SELECT * FROM farm.builds", "public"), r#"SELECT * FROM "public".builds"#);
        assert_eq!(with_schema("farm.a, farm.b", "Farm"), r#""Farm".a, "Farm".b"#);
        assert_eq!(with_schema("windfarm.a x.farm.b farm_b", "s"), "windfarm.a x.farm.b farm_b");
    }

    #[test]
    fn a_name_cannot_end_the_text_that_it_stands_in() {
        for odd in ["it's", "a$$b", "two\nlines", "\"q\"", "back\\slash", "a;b"] {
            let text = quoted(odd);
            assert!(!text.contains(['\'', '$', '\n', ';']), "{text}");
            assert_eq!(text.matches('"').count(), 2, "{text}");
        }
        assert_eq!(quoted("naïve 2"), "\"naïve 2\"");
        assert_eq!(quoted("a'b"), r#"U&"a\+000027b""#);
    }
}

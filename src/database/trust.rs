//! Who else may put objects into the schema of our tables, what others have put there, and functions of people's own that our sessions
//! call. All statements want the search_path of our sessions.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::migrate::own_names;
use super::schema::{HISTORY, Schema, quoted};
use super::{ConnInfo, Result, answered, connect, session};

const STEP: &str = "look who may change the schema";

/// Who asks, and so whose objects count as ours, beside those of superusers and of the owners of database and schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judge {
    /// `migrate`: its own role's.
    Migrating,
    /// `check`: those of the role that migrated.
    Looking,
}

/// $1 the schema. $2 boolean: `migrate` asks. $3 the table with the history of migrations.
const TRUSTED: &str = "home AS (
        SELECT n.oid, n.nspname, n.nspowner, coalesce(n.nspacl, acldefault('n', n.nspowner)) AS acl, d.datdba
        FROM pg_namespace n JOIN pg_database d ON d.datname = current_database() WHERE n.nspname = $1
    ), trusted AS MATERIALIZED (
        SELECT r.oid FROM pg_roles r WHERE r.rolsuper
        UNION SELECT h.nspowner FROM home h
        UNION SELECT h.datdba FROM home h
        UNION SELECT r.oid FROM pg_roles r WHERE $2 AND r.rolname = current_user
        UNION SELECT c.relowner FROM pg_class c JOIN home h ON c.relnamespace = h.oid WHERE NOT $2 AND c.relname = $3
    )";

/// Who may create objects in the schema and should not; and whether our role may take the right from PUBLIC.
const CREATORS: &str = "SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS role, a.grantee = 0 AS public,
        pg_has_role(h.nspowner, 'USAGE') AS may
    FROM home h CROSS JOIN aclexplode(h.acl) a
    WHERE a.privilege_type = 'CREATE' AND a.grantee NOT IN (SELECT t.oid FROM trusted t)
    GROUP BY a.grantee, h.nspowner ORDER BY 1";

/// $4 text[]: names of ours. Objects in the schema that could be found in the place of PostgreSQL's, or of ours.
const FOREIGN: &str = "SELECT f.what || ' of role ' || quote_ident(pg_get_userbyid(f.owner)) AS object FROM (
        SELECT 'function ' || p.oid::regprocedure AS what, p.proowner AS owner
        FROM pg_proc p JOIN home h ON p.pronamespace = h.oid
        WHERE p.proname = ANY ($4) OR EXISTS (SELECT FROM pg_proc b WHERE b.proname = p.proname AND b.pronamespace = 'pg_catalog'::regnamespace)
        UNION ALL
        SELECT 'operator ' || o.oid::regoperator, o.oprowner FROM pg_operator o JOIN home h ON o.oprnamespace = h.oid
        UNION ALL
        SELECT format('cast (%s AS %s)', c.castsource::regtype, c.casttarget::regtype), u.owner
        FROM pg_cast c CROSS JOIN home h CROSS JOIN LATERAL (
            SELECT p.proowner AS owner FROM pg_proc p WHERE p.oid = c.castfunc AND p.pronamespace = h.oid
            UNION SELECT t.typowner FROM pg_type t WHERE t.oid IN (c.castsource, c.casttarget) AND t.typnamespace = h.oid
        ) u
        UNION ALL
        SELECT 'type ' || t.oid::regtype, t.typowner FROM pg_type t JOIN home h ON t.typnamespace = h.oid
        WHERE t.typrelid = 0 AND (t.typname = ANY ($4) OR EXISTS (SELECT FROM pg_type b WHERE b.typname = t.typname AND b.typnamespace = 'pg_catalog'::regnamespace))
        UNION ALL
        SELECT CASE c.relkind WHEN 'v' THEN 'view ' WHEN 'i' THEN 'index ' WHEN 'S' THEN 'sequence ' WHEN 'c' THEN 'type ' ELSE 'table ' END || c.oid::regclass, c.relowner
        FROM pg_class c JOIN home h ON c.relnamespace = h.oid WHERE c.relname = ANY ($4)
    ) f
    WHERE f.owner NOT IN (SELECT t.oid FROM trusted t) ORDER BY 1";

/// $4 text[]: names of ours. Functions that a trigger, constraint, default, index or policy of people's own on our tables calls, and that find
/// names by the session's search_path. C functions know what they call; a body that was resolved when it was created does so too.
const PATHLESS: &str = "SELECT p.oid::regprocedure::text AS function, CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind, n.nspname::text AS schema,
        pg_has_role(p.proowner, 'USAGE') AS may, string_agg(DISTINCT u.relname::text, ', ') AS tables
    FROM (
        SELECT t.tgfoid AS function, c.relname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN home h ON c.relnamespace = h.oid
        WHERE NOT t.tgisinternal AND c.relname = ANY ($4)
        UNION
        SELECT d.refobjid, c.relname
        FROM pg_depend d JOIN pg_class c ON c.oid = coalesce(
                (SELECT x.conrelid FROM pg_constraint x WHERE d.classid = 'pg_constraint'::regclass AND x.oid = d.objid),
                (SELECT x.adrelid FROM pg_attrdef x WHERE d.classid = 'pg_attrdef'::regclass AND x.oid = d.objid),
                (SELECT x.tgrelid FROM pg_trigger x WHERE d.classid = 'pg_trigger'::regclass AND x.oid = d.objid),
                (SELECT x.polrelid FROM pg_policy x WHERE d.classid = 'pg_policy'::regclass AND x.oid = d.objid),
                (SELECT x.indrelid FROM pg_index x WHERE d.classid = 'pg_class'::regclass AND x.indexrelid = d.objid))
            JOIN home h ON c.relnamespace = h.oid
        WHERE d.refclassid = 'pg_proc'::regclass AND c.relname = ANY ($4)
    ) u
    JOIN pg_proc p ON p.oid = u.function JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
    WHERE l.lanname NOT IN ('c', 'internal') AND p.prosqlbody IS NULL
      AND NOT EXISTS (SELECT FROM unnest(p.proconfig) AS s WHERE s LIKE 'search_path=%')
      AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid AND e.deptype = 'e')
    GROUP BY p.oid, p.prokind, p.proowner, n.nspname ORDER BY 1";

async fn rows(client: &Client, schema: &Schema, judge: Judge, sql: &str, names: bool) -> Result<Vec<Row>> {
    let sql = format!("WITH {TRUSTED} {sql}");
    let (name, migrating, own) = (schema.name().unwrap_or_default(), judge == Judge::Migrating, own_names());
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&name, &migrating, &HISTORY];
    if names {
        values.push(&own);
    }
    answered(STEP, client.query(&sql, &values)).await
}

/// Roles (or PUBLIC) that may create objects in the schema and should not, quoted.
///
/// # Errors
/// Unknown then.
pub(super) async fn creators(client: &Client, schema: &Schema) -> Result<Vec<String>> {
    let rows = rows(client, schema, Judge::Looking, CREATORS, false).await?;
    Ok(rows.iter().map(|row| row.get("role")).collect())
}

/// Objects in the schema that could take the place of PostgreSQL's or of ours, each with its owner.
///
/// # Errors
/// Unknown then.
pub(super) async fn foreign(client: &Client, schema: &Schema, judge: Judge) -> Result<Vec<String>> {
    let rows = rows(client, schema, judge, FOREIGN, true).await?;
    Ok(rows.iter().map(|row| row.get("object")).collect())
}

/// Takes the right to create objects in the schema from PUBLIC; a sentence for what was done, and for what somebody else has to do.
///
/// # Errors
/// The server refused.
pub(super) async fn close(client: &Client, schema: &Schema) -> Result<Vec<String>> {
    let place = quoted(schema.name().unwrap_or_default());
    let mut notes = Vec::new();
    let able = rows(client, schema, Judge::Migrating, CREATORS, false).await?;
    if able.iter().any(|row| row.get("public") && row.get("may")) {
        answered(STEP, client.batch_execute(&format!("REVOKE CREATE ON SCHEMA {place} FROM PUBLIC"))).await?;
        notes.push(format!("took CREATE on schema {place} from PUBLIC, who could have put objects before ours there"));
    }
    for row in rows(client, schema, Judge::Migrating, CREATORS, false).await? {
        notes.push(may_create(schema, row.get("role")));
    }
    Ok(notes)
}

/// What is wrong when `role` may create objects in the schema, and what to do.
pub(super) fn may_create(schema: &Schema, role: &str) -> String {
    let place = quoted(schema.name().unwrap_or_default());
    format!(
        "{role} may create objects in schema {place}, and so put them before PostgreSQL's own and ours: its owner should say: REVOKE CREATE ON SCHEMA {place} FROM {role};"
    )
}

/// A function of people's own that finds names by the search_path of the session, which in sessions of ours has their schema no more.
#[derive(Clone, Debug)]
pub(super) struct Pathless {
    /// Which, for messages.
    pub(super) function: String,
    /// Our tables that use it.
    pub(super) tables: String,
    /// What mends it.
    pub(super) remedy: String,
    /// Our role may do so.
    may: bool,
}

/// Those functions.
///
/// # Errors
/// Unknown then.
pub(super) async fn pathless(client: &Client, schema: &Schema) -> Result<Vec<Pathless>> {
    let rows = rows(client, schema, Judge::Looking, PATHLESS, true).await?;
    let read = |row: &Row| {
        let (function, kind): (String, &str) = (row.get("function"), row.get("kind"));
        let remedy = format!("ALTER {kind} {function} SET search_path = {}", schema.path_of_people(row.get("schema")));
        Pathless { function, tables: row.get("tables"), remedy, may: row.get("may") }
    };
    Ok(rows.iter().map(read).collect())
}

/// Gives those functions the search_path that they had in people's own sessions; a sentence for each.
///
/// # Errors
/// The server refused.
pub(super) async fn give_paths(client: &Client, schema: &Schema) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for Pathless { function, tables, remedy, may } in pathless(client, schema).await? {
        if may {
            answered("set the search_path of a function", client.batch_execute(&remedy)).await?;
            notes.push(format!("{remedy}; -- done: {tables} call it, also in sessions of workers"));
        } else {
            notes.push(format!(
                "{function}, which {tables} call, finds no table in sessions of workers: its owner should say: {remedy};"
            ));
        }
    }
    Ok(notes)
}

/// [`give_paths`] over a connection of its own, for a daemon that starts: such a function may be younger than the last `migrate`.
///
/// # Errors
/// No connection, or the server refused.
pub async fn give_paths_at_start(info: &ConnInfo) -> Result<Vec<String>> {
    let (client, connection) = connect(info, "buildreactor").await?;
    let _driver = crate::tasks::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %crate::report::Chain(&error), "the connection ended");
        }
    });
    let schema = Schema::default();
    answered(STEP, session::prepare(&client, &schema, &session::work())).await?;
    give_paths(&client, &schema).await
}

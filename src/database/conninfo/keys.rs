//! Every connection setting libpq knows (PostgreSQL 18, "Parameter Key Words" and "Environment
//! Variables"), and what becomes of it here.

use Treatment::{Ignore, Refuse, Use};

/// What is done with a setting.
#[derive(Debug, Clone, Copy)]
pub(super) enum Treatment {
    /// Honoured.
    Use,
    /// Without meaning here; the session is no weaker without it.
    Ignore,
    /// Refused for the reason given, unless the value is empty or one of these.
    Refuse(&'static [&'static str], &'static str),
}

/// A setting libpq knows.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) variable: Option<&'static str>,
    pub(super) treatment: Treatment,
}

/// An empty `variable` stands for none.
const fn key(name: &'static str, variable: &'static str, treatment: Treatment) -> Key {
    Key { name, variable: if variable.is_empty() { None } else { Some(variable) }, treatment }
}

pub(super) const KEYS: &[Key] = &[
    key("service", "PGSERVICE", Use),
    key("servicefile", "PGSERVICEFILE", Use),
    key("host", "PGHOST", Use),
    key("hostaddr", "PGHOSTADDR", Use),
    key("port", "PGPORT", Use),
    key("dbname", "PGDATABASE", Use),
    key("user", "PGUSER", Use),
    key("password", "PGPASSWORD", Use),
    key("passfile", "PGPASSFILE", Use),
    key("options", "PGOPTIONS", Use),
    key("application_name", "PGAPPNAME", Use),
    key("fallback_application_name", "", Use),
    key("connect_timeout", "PGCONNECT_TIMEOUT", Use),
    key("keepalives", "", Use),
    key("keepalives_idle", "", Use),
    key("keepalives_interval", "", Use),
    key("keepalives_count", "", Use),
    key("tcp_user_timeout", "", Use),
    key("target_session_attrs", "PGTARGETSESSIONATTRS", Use),
    key("load_balance_hosts", "PGLOADBALANCEHOSTS", Use),
    key("channel_binding", "PGCHANNELBINDING", Use),
    key("sslmode", "PGSSLMODE", Use),
    key("sslnegotiation", "PGSSLNEGOTIATION", Use),
    key("sslrootcert", "PGSSLROOTCERT", Use),
    key("sslcrl", "PGSSLCRL", Use),
    key("sslcert", "PGSSLCERT", Use),
    key("sslkey", "PGSSLKEY", Use),
    key("sslsni", "PGSSLSNI", Use),
    // tokio-postgres always speaks UTF-8 and protocol 3.0, and never compresses.
    key("client_encoding", "PGCLIENTENCODING", Ignore),
    key("max_protocol_version", "PGMAXPROTOCOLVERSION", Ignore),
    key("sslcompression", "PGSSLCOMPRESSION", Ignore),
    // Only needed for an encrypted key, and such a key is refused when it is read.
    key("sslpassword", "", Ignore),
    key("sslkeylogfile", "", Ignore),
    // How to do Kerberos, when the server asks for it: it then says that it may not.
    key("krbsrvname", "PGKRBSRVNAME", Ignore),
    key("gsslib", "PGGSSLIB", Ignore),
    key("gssdelegation", "PGGSSDELEGATION", Ignore),
    // Dead in libpq too, but still accepted by some versions.
    key("authtype", "", Ignore),
    key("tty", "", Ignore),
    key("gssencmode", "PGGSSENCMODE", Refuse(&["disable", "prefer"], GSSENCMODE)),
    key("requirepeer", "PGREQUIREPEER", Refuse(&[], REQUIREPEER)),
    key("require_auth", "PGREQUIREAUTH", Refuse(&[], REQUIRE_AUTH)),
    key("sslcertmode", "PGSSLCERTMODE", Refuse(&["disable", "allow"], SSLCERTMODE)),
    key("sslcrldir", "PGSSLCRLDIR", Refuse(&[], SSLCRLDIR)),
    key("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Refuse(&["TLSv1", "TLSv1.1", "TLSv1.2"], TLS_VERSION)),
    key("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Refuse(&["TLSv1.3"], TLS_VERSION)),
    key("min_protocol_version", "PGMINPROTOCOLVERSION", Refuse(&["3.0"], PROTOCOL)),
    key("replication", "", Refuse(&["false", "off", "no", "0"], REPLICATION)),
    key("scram_client_key", "", Refuse(&[], LOGIN)),
    key("scram_server_key", "", Refuse(&[], LOGIN)),
    key("oauth_issuer", "", Refuse(&[], LOGIN)),
    key("oauth_client_id", "", Refuse(&[], LOGIN)),
    key("oauth_client_secret", "", Refuse(&[], LOGIN)),
    key("oauth_scope", "", Refuse(&[], LOGIN)),
];

const GSSENCMODE: &str = "there is no GSSAPI encryption here; use TLS with `sslmode=verify-full`";
const REQUIREPEER: &str = "the owner of the server's socket cannot be checked here; use a socket \
    directory only that user can write to, and leave it out";
const REQUIRE_AUTH: &str = "the way to log in cannot be pinned here; use \
    `channel_binding=require` or `sslmode=verify-full`";
const SSLCERTMODE: &str = "whether the server asked for a certificate is not known here; use \
    `clientcert` in its `pg_hba.conf`, and `allow` or `disable` here";
const SSLCRLDIR: &str = "only a file of revocation lists can be read; concatenate them and name \
    the file with `sslcrl`";
const TLS_VERSION: &str = "TLS 1.2 and 1.3 are spoken here, whichever is the higher one the server \
    has; limit it there with the setting of the same name";
const PROTOCOL: &str = "only protocol 3.0 is spoken here; leave it out";
const REPLICATION: &str = "a replication connection runs no ordinary statements; leave it out";
const LOGIN: &str = "log in with a password (`password`, `passfile`) or a client certificate \
    (`sslcert`)";

pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Keys that `word` was probably meant to be, best first, at most three.
pub(super) fn near(word: &str) -> Vec<&'static str> {
    // What other drivers call them.
    const ALIASES: &[(&str, &str)] = &[
        ("database", "dbname"),
        ("db", "dbname"),
        ("pwd", "password"),
        ("server", "host"),
        ("timeout", "connect_timeout"),
        ("schema", "options"),
        ("search_path", "options"),
        ("keepalives_retries", "keepalives_count"),
        ("ssl", "sslmode"),
    ];
    let word = word.trim().to_ascii_lowercase();
    let alias = ALIASES.iter().find(|(from, _)| *from == word);
    let mut scored: Vec<(usize, &'static str)> = KEYS
        .iter()
        .filter(|key| matches!(key.treatment, Use))
        .filter_map(|key| {
            let distance = edit_distance(&word, key.name);
            let contained = word.len() >= 4 && (key.name.contains(&word) || word.contains(key.name));
            let allowed = if key.name.len() < 6 { 1 } else { 2 };
            let shuffled = letters(&word) == letters(key.name);
            (distance <= allowed || shuffled || contained).then_some((distance, key.name))
        })
        .collect();
    scored.sort_unstable();
    alias.map(|(_, to)| *to).into_iter().chain(scored.into_iter().map(|(_, name)| name)).take(3).collect()
}

fn letters(word: &str) -> Vec<u8> {
    let mut letters = word.as_bytes().to_vec();
    letters.sort_unstable();
    letters
}

/// Levenshtein's distance, in bytes.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_keys_are_those_a_person_may_have_meant() {
        for (word, expected) in [
            ("hots", "host"),
            ("prot", "port"),
            ("usr", "user"),
            ("username", "user"),
            ("database", "dbname"),
            ("ssl_mode", "sslmode"),
            ("sslrootcrt", "sslrootcert"),
            ("HOST", "host"),
            ("timeout", "connect_timeout"),
        ] {
            assert!(near(word).contains(&expected), "{word}: {:?}", near(word));
        }
        assert!(near("colour").is_empty());
    }

    #[test]
    fn no_key_or_variable_is_listed_twice() {
        for (i, key) in KEYS.iter().enumerate() {
            for other in &KEYS[i + 1..] {
                assert_ne!(key.name, other.name);
                assert!(key.variable.is_none() || key.variable != other.variable);
            }
        }
    }
}

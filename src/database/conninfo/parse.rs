//! The three ways to write a connection: URL, key=value pairs, a plain database name.
//!
//! Follows `conninfo_uri_parse_options` and `conninfo_parse` of libpq's `fe-connect.c`, with two
//! differences on the safe side. A stray `@` in a URL is refused: libpq would take the rest of a
//! password for a host or database name, and show it. And no message repeats what was written,
//! because a mistake in the wrong place makes a piece of the password look like anything else.

use super::error::{ConnInfoError, Origin};
use super::keys;

/// Settings as written, in order; a later one of the same key wins.
pub(super) type Pairs = Vec<(String, String)>;

/// Parses what a person wrote. `text` is not blank.
pub(super) fn parse(text: &str) -> Result<Pairs, ConnInfoError> {
    let url = ["postgresql://", "postgres://"].iter().find_map(|prefix| text.strip_prefix(prefix));
    let pairs = if let Some(rest) = url {
        parse_url(rest)?
    } else if let Some(scheme) = foreign_scheme(text) {
        return Err(syntax(format!("`{scheme}://` is not a PostgreSQL URL; it begins with `postgresql://`")));
    } else if text.contains('=') {
        parse_pairs(text)?
    } else {
        // A URL that lost its head must not become a name, which is shown.
        if text.contains('@') || text.contains("://") {
            return Err(syntax(
                "this is no database name; a URL begins with `postgresql://`, and a name with an \
                 `@` is written `dbname='a@b'`",
            ));
        }
        vec![("dbname".to_owned(), text.to_owned())]
    };
    check_keys(&pairs)?;
    Ok(pairs)
}

fn syntax(problem: impl Into<String>) -> ConnInfoError {
    ConnInfoError::Syntax { origin: Origin::Text, problem: problem.into() }
}

fn foreign_scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once("://")?;
    let word = |c: char| c.is_ascii_alphanumeric() || "+.-".contains(c);
    (scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(word)).then_some(scheme)
}

/// Refuses unknown keys here when naming them could print half a password, as in
/// `password=two words=secret`; others are named by the caller.
fn check_keys(pairs: &Pairs) -> Result<(), ConnInfoError> {
    let mut after_password = false;
    for (position, (key, _)) in pairs.iter().enumerate() {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let nameable = key.chars().all(word) && !after_password;
        if keys::find(key).is_none() && !nameable {
            return Err(syntax(format!(
                "setting number {} is unknown; if it belongs to the value before it, write that \
                 as `key='value with spaces'`, or in a URL `%26` for `&`",
                position + 1
            )));
        }
        after_password = key.contains("password");
    }
    Ok(())
}

/// `key = value key='it\'s'`; a backslash takes the next character as it is.
fn parse_pairs(text: &str) -> Result<Pairs, ConnInfoError> {
    let mut pairs = Pairs::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(pairs);
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|&c| c != '=' && !c.is_ascii_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            return Err(syntax(format!(
                "setting number {} has no `=`; write `key=value`, and a value with spaces as \
                 `key='a b'`",
                pairs.len() + 1
            )));
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next() {
                Some('\'') if quoted => break,
                None if quoted => {
                    return Err(syntax(format!(
                        "the quoted value of setting number {} has no end; close it with `'`, and \
                         write a quote inside as `\\'`",
                        pairs.len() + 1
                    )));
                }
                Some(c) if !quoted && c.is_ascii_whitespace() => break,
                Some('\\') => value.extend(chars.next()),
                Some(c) => value.push(c),
                None => break,
            }
        }
        pairs.push((key, value));
    }
}

/// What follows `postgresql://`: `[user[:password]@][host[:port][,...]][/dbname][?key=value&...]`.
fn parse_url(rest: &str) -> Result<Pairs, ConnInfoError> {
    let mut pairs = Pairs::new();
    let mut store = |key: &str, encoded: &str| -> Result<(), ConnInfoError> {
        if !encoded.is_empty() {
            pairs.push((key.to_owned(), decode(encoded)?));
        }
        Ok(())
    };

    let stop = rest.find(['@', '/']).unwrap_or(rest.len());
    let rest = if rest[stop..].starts_with('@') {
        let (user, password) = split_at_char(&rest[..stop], ':');
        store("user", user)?;
        store("password", password)?;
        &rest[stop + 1..]
    } else {
        rest
    };

    let (target, query) = split_at_char(rest, '?');
    if target.contains('@') {
        return Err(syntax(
            "the URL has an `@` too many; in a user name, password or database name write `%40` \
             for `@`, `%2F` for `/` and `%3A` for `:`",
        ));
    }
    let (authority, dbname) = split_at_char(target, '/');
    let (hosts, ports) = split_authority(authority)?;
    store("host", &hosts)?;
    store("port", &ports)?;
    store("dbname", dbname)?;

    for (position, parameter) in query.split('&').filter(|p| !p.is_empty()).enumerate() {
        let Some((key, value)) = parameter.split_once('=') else {
            return Err(syntax(format!(
                "parameter number {} after the `?` has no `=`; write `key=value`, and `%26` for an \
                 `&` inside a value",
                position + 1
            )));
        };
        match (decode(key)?, decode(value)?) {
            // As JDBC writes it; libpq takes it in URLs only.
            (key, value) if key == "ssl" && value == "true" => {
                pairs.push(("sslmode".to_owned(), "require".to_owned()));
            }
            pair => pairs.push(pair),
        }
    }
    Ok(pairs)
}

/// `h1:p1,[::1],h3` as `h1,::1,h3` and `p1,,`, still percent-encoded.
fn split_authority(authority: &str) -> Result<(String, String), ConnInfoError> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for part in authority.split(',') {
        let (host, port) = match part.strip_prefix('[') {
            None => split_at_char(part, ':'),
            Some(bracketed) => match bracketed.split_once(']') {
                Some((host, "")) if !host.is_empty() => (host, ""),
                Some((host, after)) if !host.is_empty() && after.starts_with(':') => (host, &after[1..]),
                Some(_) | None => {
                    return Err(syntax("the URL has an incomplete IPv6 address; write it like `[::1]:5432`"));
                }
            },
        };
        hosts.push(host);
        ports.push(port);
    }
    Ok((hosts.join(","), ports.join(",")))
}

/// Both sides of the first `separator`; the second is empty where there is none.
fn split_at_char(text: &str, separator: char) -> (&str, &str) {
    text.split_once(separator).unwrap_or((text, ""))
}

/// Percent-decoding; `+` stays `+`.
fn decode(encoded: &str) -> Result<String, ConnInfoError> {
    let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
    let mut bytes = encoded.bytes();
    let mut decoded = Vec::with_capacity(encoded.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) if high + low > 0 => {
                decoded.push(u8::try_from(high * 16 + low).unwrap_or_default());
            }
            (Some(_), Some(_)) => {
                return Err(syntax("the URL has `%00`, which no setting may hold"));
            }
            (None, _) | (_, None) => {
                return Err(syntax(
                    "the URL has a `%` without two hexadecimal digits after it; write a plain `%` \
                     as `%25`",
                ));
            }
        }
    }
    String::from_utf8(decoded).map_err(|_| syntax("the URL's percent-encoded bytes are not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(text: &str) -> String {
        match parse(text) {
            Ok(pairs) => pairs.iter().map(|(key, value)| format!("{key}=<{value}>")).collect::<Vec<_>>().join(" "),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn urls_are_read_as_libpq_reads_them() {
        for (url, expected) in [
            ("postgresql://", ""),
            ("postgres://localhost", "host=<localhost>"),
            ("postgresql:///builds", "dbname=<builds>"),
            ("postgresql://h:5433", "host=<h> port=<5433>"),
            ("postgresql://h/d", "host=<h> dbname=<d>"),
            ("postgresql://u@h", "user=<u> host=<h>"),
            ("postgresql://u:p%40%2F@h", "user=<u> password=<p@/> host=<h>"),
            ("postgresql://:p@h", "password=<p> host=<h>"),
            ("postgresql://u:a:b@h", "user=<u> password=<a:b> host=<h>"),
            ("postgresql://u:p?q@h", "user=<u> password=<p?q> host=<h>"),
            ("postgresql://h1:1,h2:2/d", "host=<h1,h2> port=<1,2> dbname=<d>"),
            ("postgresql://h1,h2/", "host=<h1,h2> port=<,>"),
            ("postgresql://[::1]:7/d", "host=<::1> port=<7> dbname=<d>"),
            ("postgresql://[2001:db8::1]/d", "host=<2001:db8::1> dbname=<d>"),
            ("postgresql://a,[::1]:7", "host=<a,::1> port=<,7>"),
            ("postgresql://%2Fvar%2Frun/db", "host=</var/run> dbname=<db>"),
            ("postgresql:///d?host=/var/run/postgresql&user=x@y", "dbname=<d> host=</var/run/postgresql> user=<x@y>"),
            ("postgresql://h?sslmode=require", "host=<h> sslmode=<require>"),
            ("postgresql://h/?ssl=true", "host=<h> sslmode=<require>"),
            (
                "postgresql:///d?options=-c%20search_path%3Dfarm&application_name=a+b",
                "dbname=<d> options=<-c search_path=farm> application_name=<a+b>",
            ),
            ("postgresql:///d?options=-csearch_path=x", "dbname=<d> options=<-csearch_path=x>"),
            ("postgresql:///d?", "dbname=<d>"),
            ("postgresql://h/%64%C3%A9", "host=<h> dbname=<d\u{e9}>"),
            ("postgresql://@h/d", "host=<h> dbname=<d>"),
        ] {
            assert_eq!(joined(url), expected, "{url}");
        }
    }

    #[test]
    fn key_value_strings_take_quotes_backslashes_and_spaces() {
        for (text, expected) in [
            ("host=h port=1", "host=<h> port=<1>"),
            ("  host = h\n port =1 ", "host=<h> port=<1>"),
            (r"password='a b\'c\\d'", r"password=<a b'c\d>"),
            (r"password=a\ b\'c", "password=<a b'c>"),
            ("host='' dbname=d", "host=<> dbname=<d>"),
            ("host= dbname=d", "host=<dbname=d>"),
            ("user=a'b", "user=<a'b>"),
            ("password=x=y", "password=<x=y>"),
            ("password='x'user=u", "password=<x> user=<u>"),
            ("user=", "user=<>"),
        ] {
            assert_eq!(joined(text), expected, "{text}");
        }
    }

    #[test]
    fn a_text_without_scheme_and_equals_sign_is_a_database_name() {
        assert_eq!(joined("builds"), "dbname=<builds>");
        assert_eq!(joined("my builds"), "dbname=<my builds>");
    }

    #[test]
    fn mistakes_are_explained_without_repeating_the_text() {
        for (text, expected) in [
            ("mysql://u:hunter2@h/d", "`mysql://` is not a PostgreSQL URL"),
            ("POSTGRESQL://u:hunter2@h/d", "begins with `postgresql://`"),
            ("https://u:hunter2@h/d?a=b", "`https://` is not"),
            ("u:hunter2@h/d", "begins with `postgresql://`"),
            ("://u:hunter2", "begins with `postgresql://`"),
            ("u:hunter2@h/d?a=b", "setting number 1 is unknown"),
            ("postgresql://u:hunt@er2@h/d", "`%40` for `@`"),
            ("postgresql://u:1/hunter2@h/d", "`%2F` for `/`"),
            ("postgresql://u:hunter%2@h", "`%25`"),
            ("postgresql://u:hunter2%zz@h", "`%25`"),
            ("postgresql://u:hunter2%00@h", "`%00`"),
            ("postgresql://u:hunter2%ff@h", "not UTF-8"),
            ("postgresql://[::1/d", "`[::1]:5432`"),
            ("postgresql://[]/d", "`[::1]:5432`"),
            ("postgresql://[::1]5432/d", "`[::1]:5432`"),
            ("postgresql://h/d?sslmode", "parameter number 1"),
            ("postgresql://h/d?password=a&hunter2", "parameter number 2"),
            ("postgresql://h/d?password=a&hunter2=b", "setting number 4"),
            ("password=my hunter2", "setting number 2 has no `=`"),
            ("password=my hunter2=x", "setting number 2 is unknown"),
            ("password='hunter2", "close it with `'`"),
            ("host=h http://hunter2=x", "setting number 2 is unknown"),
        ] {
            let said = joined(text);
            assert!(said.contains(expected), "{text}: {said}");
            assert!(!said.contains("hunter2"), "{text}: {said}");
        }
    }
}

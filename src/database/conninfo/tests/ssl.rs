//! What is asked of TLS, and of what cannot be had.

use super::*;

#[test]
fn what_would_leave_the_connection_weaker_is_refused() {
    let home = Home::new();
    for text in [
        "gssencmode=require",
        "requirepeer=postgres",
        "require_auth=scram-sha-256",
        "sslcrldir=/d",
        "min_protocol_version=3.2",
        "replication=database",
        "sslcertmode=require",
        "ssl_min_protocol_version=TLSv1.3",
        "ssl_max_protocol_version=TLSv1.2",
        "target_session_attrs=standby",
        "oauth_issuer=https",
    ] {
        let (key, _) = text.split_once('=').unwrap();
        let said = home.error(text);
        let start = format!("connection string: `{key}` cannot be honoured: ");
        assert!(said.starts_with(&start), "{said}");
    }
    let said = Home::new().with(&[("PGREQUIREAUTH", "none")]).error("");
    assert!(said.starts_with("variable `PGREQUIREAUTH`: `require_auth` cannot"), "{said}");
    assert!(home.error("host=h sslnegotiation=direct").contains("needs `sslmode=require`"));
    assert!(home.error("host=h sslrootcert=system sslmode=require").contains("too weak"));
}

#[test]
fn what_makes_no_difference_is_accepted() {
    let home = Home::new();
    for text in [
        "gssencmode=disable",
        "gssencmode=prefer",
        "requirepeer=''",
        // Only sockets have peers.
        "host=h requirepeer=postgres",
        "krbsrvname=postgres",
        "sslcompression=1",
        "client_encoding=auto",
        "min_protocol_version=3.0",
        "replication=false",
        "sslpassword=x",
        "ssl_min_protocol_version=TLSv1",
        "ssl_min_protocol_version=tlsv1.2",
        "ssl_max_protocol_version=TLSv1.3",
        "sslcertmode=disable",
        "sslsni=0",
        "target_session_attrs=primary",
    ] {
        assert!(home.resolve(text).is_ok(), "{text}: {}", home.error(text));
    }
}

#[test]
fn the_ssl_modes_become_what_tokio_postgres_knows() {
    let home = Home::new();
    for (text, expected) in [
        ("", WireMode::Prefer),
        ("sslmode=disable", WireMode::Disable),
        ("sslmode=allow", WireMode::Prefer),
        ("sslmode=prefer", WireMode::Prefer),
        ("sslmode=require", WireMode::Require),
        ("sslmode=verify-ca", WireMode::Require),
        ("sslmode=verify-full", WireMode::Require),
        ("sslrootcert=system", WireMode::Require),
    ] {
        let info = home.ok(&format!("host=h {text}"));
        assert_eq!(info.config().get_ssl_mode(), expected, "{text}");
    }
    let info = home.ok("host=h sslrootcert=system");
    assert_eq!(info.tls.mode, SslMode::VerifyFull);
}

fn tls_error(info: &ConnInfo) -> String {
    info.tls().err().unwrap().to_string()
}

#[test]
fn verifying_needs_a_root_certificate_and_says_how_to_get_one() {
    let home = Home::new();
    for mode in ["verify-ca", "verify-full"] {
        let said = tls_error(&home.ok(&format!("host=h sslmode={mode}")));
        assert!(said.starts_with(&format!("connection string: `sslmode={mode}` needs")), "{said}");
        assert!(said.contains("/.postgresql/root.crt` does not exist"), "{said}");
        assert!(said.contains("`sslrootcert=system`"), "{said}");
    }
    for mode in ["disable", "allow", "prefer", "require"] {
        assert!(home.ok(&format!("host=h sslmode={mode}")).tls().is_ok(), "{mode}");
    }
    assert!(home.ok("host=/tmp sslmode=verify-full").tls().is_ok());
}

#[test]
fn a_root_certificate_that_cannot_be_read_is_an_error_also_for_require() {
    let home = Home::new();
    home.file(".postgresql/root.crt", 0o644, "no certificate\n");
    let said = tls_error(&home.ok("host=h sslmode=require"));
    assert!(said.contains("root.crt`: it holds none in PEM form"), "{said}");
    assert!(home.ok("host=h sslmode=prefer").tls().is_ok());
}

#[test]
fn a_client_certificate_needs_a_key_that_nobody_else_can_read() {
    let made = rcgen::generate_simple_self_signed(["alice".to_owned()]).unwrap();
    let home = Home::new();
    home.file(".postgresql/postgresql.crt", 0o644, &made.cert.pem());
    let info = home.ok("host=h");
    let said = tls_error(&info);
    assert!(said.contains("postgresql.key`: a client certificate needs its private key"), "{said}");

    let pem = made.signing_key.serialize_pem();
    home.file(".postgresql/postgresql.key", 0o644, &pem);
    assert!(tls_error(&info).contains("`chmod 600` it"));
    home.file(".postgresql/postgresql.key", 0o600, &pem);
    assert!(info.tls().is_ok());
    home.file(
        ".postgresql/postgresql.key",
        0o600,
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----\n",
    );
    assert!(tls_error(&info).contains("without passphrase"));
    let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
    home.file(".postgresql/postgresql.key", 0o600, &other);
    assert!(tls_error(&info).contains("do not belong together"));
    assert!(home.ok("host=h sslcertmode=disable").tls().is_ok());
    assert!(home.ok("host=h sslcert=/nonexistent").tls().is_ok());
}

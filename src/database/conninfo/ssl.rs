//! What the `ssl...` settings ask for.

use std::path::{Path, PathBuf};

use super::endpoint::Endpoint;
use super::error::{ConnInfoError, Origin};
use super::settings::Settings;
use crate::database::tls::{NamedFile, RootCertificate, SslMode, TlsSettings};

const MODES: &[(&str, SslMode)] = &[
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

/// Reads the settings; no file is opened before a connection needs it.
pub(super) fn read(
    settings: &Settings,
    endpoints: &[Endpoint],
    home: Option<&Path>,
) -> Result<TlsSettings, ConnInfoError> {
    let file = |key: &'static str, default: &str| match (settings.get(key), home) {
        (Some(path), _) => Some(NamedFile { path: PathBuf::from(path), origin: settings.origin(key) }),
        (None, Some(home)) => Some(NamedFile { path: home.join(".postgresql").join(default), origin: Origin::Default }),
        (None, None) => None,
    };
    let root = if settings.get("sslrootcert") == Some("system") {
        RootCertificate::System
    } else {
        RootCertificate::File(file("sslrootcert", "root.crt"))
    };
    let direct = settings.choice("sslnegotiation", &[("postgres", false), ("direct", true)])?.unwrap_or(false);
    Ok(TlsSettings {
        mode: mode(settings, endpoints, &root, direct)?,
        mode_origin: settings.origin("sslmode"),
        root,
        crl: file("sslcrl", "root.crl"),
        // `require` was refused before.
        cert: file("sslcert", "postgresql.crt").filter(|_| settings.get("sslcertmode") != Some("disable")),
        key: file("sslkey", "postgresql.key"),
        server_name_indication: settings.get("sslsni") != Some("0"),
        direct,
        channel_binding_required: settings.get("channel_binding") == Some("require"),
    })
}

fn mode(
    settings: &Settings,
    endpoints: &[Endpoint],
    root: &RootCertificate,
    direct: bool,
) -> Result<SslMode, ConnInfoError> {
    let mode = settings.choice("sslmode", MODES)?;
    let system = matches!(root, RootCertificate::System);
    if system && mode.is_some_and(|mode| mode != SslMode::VerifyFull) {
        return Err(settings.bad(
            "sslmode",
            "is too weak for `sslrootcert=system`, where anybody can get a certificate; use \
             `verify-full`",
        ));
    }
    let default = if system { SslMode::VerifyFull } else { SslMode::Prefer };
    let mode = mode.unwrap_or(default);
    let optional = match mode {
        SslMode::Disable | SslMode::Allow | SslMode::Prefer => true,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => false,
    };
    // PostgreSQL has no TLS on sockets, and libpq ignores the mode there. tokio-postgres doesn't:
    // it would refuse to connect.
    let sockets = endpoints.iter().filter(|e| e.is_socket()).count();
    if sockets == endpoints.len() {
        return Ok(SslMode::Disable);
    }
    if sockets > 0 && !optional {
        return Err(settings.bad(
            "sslmode",
            "asks for TLS, which the socket directories among the hosts do not have; name sockets \
             only or network hosts only",
        ));
    }
    if direct && optional {
        return Err(settings.bad("sslnegotiation", "`direct` needs `sslmode=require` or stronger"));
    }
    if mode == SslMode::VerifyFull && endpoints.iter().any(|e| !e.has_name()) {
        return Err(settings.bad(
            "hostaddr",
            "alone gives no name to compare with the certificate, which `verify-full` asks for; \
             add `host`",
        ));
    }
    Ok(mode)
}

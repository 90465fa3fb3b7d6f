//! TLS towards PostgreSQL, as strict as libpq's `sslmode` asks (PostgreSQL's manual, libpq,
//! "SSL Support").
//!
//! The crypto provider is ring, passed explicitly: nothing depends on a process default.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::conninfo::{ConnInfoError, Origin};

/// libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SslMode {
    Disable,
    /// Treated as [`SslMode::Prefer`].
    Allow,
    /// TLS if the server has it; nothing is verified.
    Prefer,
    /// TLS; verified like [`SslMode::VerifyCa`] if there is a root certificate, else not at all.
    Require,
    /// The certificate comes from a trusted authority.
    VerifyCa,
    /// And it is for the host that was named.
    VerifyFull,
}

/// A file somebody named, or a usual place, which may be empty.
#[derive(Debug, Clone)]
pub(super) struct NamedFile {
    pub(super) path: PathBuf,
    /// [`Origin::Default`] for the usual place.
    pub(super) origin: Origin,
}

/// Whom to trust.
#[derive(Debug, Clone)]
pub(super) enum RootCertificate {
    /// The authorities the operating system trusts.
    System,
    /// Those in a file, if it exists. `None`: no file named and no home directory.
    File(Option<NamedFile>),
}

/// What was asked of TLS.
#[derive(Debug, Clone)]
pub(super) struct TlsSettings {
    pub(super) mode: SslMode,
    pub(super) mode_origin: Origin,
    pub(super) root: RootCertificate,
    pub(super) crl: Option<NamedFile>,
    pub(super) cert: Option<NamedFile>,
    pub(super) key: Option<NamedFile>,
    pub(super) server_name_indication: bool,
    pub(super) direct: bool,
    pub(super) channel_binding_required: bool,
}

/// Builds the connector. Reads files, blocking.
///
/// # Errors
/// See [`super::conninfo::ConnInfo::tls`].
pub(super) fn connector(settings: &TlsSettings) -> Result<MakeRustlsConnect, ConnInfoError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(refused)?;
    if settings.mode == SslMode::Disable {
        // tokio-postgres wants a connector all the same; this one trusts nobody.
        let nobody = builder.with_root_certificates(RootCertStore::empty());
        return Ok(MakeRustlsConnect::new(nobody.with_no_client_auth()));
    }
    let verifier = Verifier {
        algorithms: provider.signature_verification_algorithms,
        trust: trust(settings, &provider)?,
        channel_binding_required: settings.channel_binding_required,
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client_certificate(settings)? {
        Some(identity) => builder.with_client_auth_cert(identity.chain, identity.key).map_err(|error| {
            let advice = "it and the private key do not belong together; check `sslkey`";
            unusable(identity.file, CLIENT, advice, Some(error.into()))
        })?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = settings.server_name_indication;
    if settings.direct {
        // Without it, PostgreSQL 17 refuses a handshake that no SSLRequest came before.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(MakeRustlsConnect::new(config))
}

fn refused(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ConnInfoError {
    ConnInfoError::Tls(error.into())
}

/// What a certificate is compared with; `None` where the mode asks for no comparison.
fn trust(
    settings: &TlsSettings,
    provider: &Arc<rustls::crypto::CryptoProvider>,
) -> Result<Option<Trust>, ConnInfoError> {
    let (must_verify, host_name) = match settings.mode {
        SslMode::Disable | SslMode::Allow | SslMode::Prefer => return Ok(None),
        SslMode::Require => (None, HostName::Any),
        SslMode::VerifyCa => (Some("verify-ca"), HostName::Any),
        SslMode::VerifyFull => (Some("verify-full"), HostName::MustMatch),
    };
    let (trusted, root) = match &settings.root {
        RootCertificate::System => (system_certificates()?, None),
        RootCertificate::File(file) => match (existing(file.as_ref(), ROOT)?, must_verify) {
            (Some(file), _) => (read_pem(file, ROOT)?, Some(file)),
            (None, None) => return Ok(None),
            (None, Some(mode)) => {
                return Err(ConnInfoError::NoRootCertificate {
                    origin: settings.mode_origin.clone(),
                    mode,
                    looked: match file {
                        Some(file) => format!("`{}` does not exist", file.path.display()),
                        None => "there is no home directory to look in".to_owned(),
                    },
                });
            }
        },
    };
    let mut roots = RootCertStore::empty();
    let (_, unreadable) = roots.add_parsable_certificates(trusted.iter().cloned());
    if let (Some(file), true) = (root, roots.is_empty()) {
        return Err(unusable(file, ROOT, "it holds none that can be read", None));
    }
    if unreadable > 0 {
        tracing::warn!("{unreadable} trusted root certificates cannot be read and are left out");
    }
    let crl = existing(settings.crl.as_ref(), CRL)?;
    let revoked: Vec<CertificateRevocationListDer<'static>> = match crl {
        Some(file) => read_pem(file, CRL)?,
        None => Vec::new(),
    };
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .with_crls(revoked)
        .enforce_revocation_expiration()
        .build()
        .map_err(|error| match crl {
            Some(file) => unusable(file, CRL, "it cannot be read as one", Some(error.into())),
            None => refused(error),
        })?;
    Ok(Some(Trust { chain, trusted, host_name }))
}

fn system_certificates() -> Result<Vec<CertificateDer<'static>>, ConnInfoError> {
    let mut found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err(ConnInfoError::File {
            origin: Origin::Default,
            what: "system's root certificates",
            path: PathBuf::from("/etc/ssl/certs"),
            advice: "none were found; install the package `ca-certificates`, or name a file with \
                     `sslrootcert`",
            source: found.errors.pop().map(Into::into),
        });
    }
    Ok(found.certs)
}

/// The certificate to show, with its key.
struct ClientCertificate<'a> {
    file: &'a NamedFile,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

const ROOT: &str = "root certificate";
const CRL: &str = "revocation list";
const CLIENT: &str = "client certificate";
const KEY: &str = "private key";

fn client_certificate(settings: &TlsSettings) -> Result<Option<ClientCertificate<'_>>, ConnInfoError> {
    let Some(cert) = existing(settings.cert.as_ref(), CLIENT)? else {
        return Ok(None);
    };
    let chain = read_pem(cert, CLIENT)?;
    let Some(key) = &settings.key else {
        return Err(unusable(cert, CLIENT, "name its private key with `sslkey`", None));
    };
    check_key_permissions(key)?;
    let private = PrivateKeyDer::from_pem_file(&key.path).map_err(|error| {
        let advice = "it must hold a PEM private key without passphrase; `openssl pkey -in FILE \
                      -out NEW` takes one away";
        unusable(key, KEY, advice, Some(error.into()))
    })?;
    Ok(Some(ClientCertificate { file: cert, chain, key: private }))
}

/// libpq's rule: a file of root's may be readable for a group, anybody else's is for its owner.
fn check_key_permissions(key: &NamedFile) -> Result<(), ConnInfoError> {
    let meta = fs::metadata(&key.path).map_err(|error| {
        let advice = "a client certificate needs its private key; name it with `sslkey`";
        unusable(key, KEY, advice, Some(error.into()))
    })?;
    if !meta.is_file() {
        return Err(unusable(key, KEY, "it must be a plain file", None));
    }
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        let advice = "others may read it; `chmod 600` it (root's may be 640)";
        return Err(unusable(key, KEY, advice, None));
    }
    Ok(())
}

/// The file, if there is one. libpq goes on without a missing file even when it was named; so does
/// this, but not silently. A usual place that cannot be looked into holds nothing: a daemon's home
/// directory may be somebody else's.
fn existing<'a>(file: Option<&'a NamedFile>, what: &'static str) -> Result<Option<&'a NamedFile>, ConnInfoError> {
    let Some(file) = file else { return Ok(None) };
    let Err(error) = fs::metadata(&file.path) else {
        return Ok(Some(file));
    };
    if file.origin == Origin::Default {
        return Ok(None);
    }
    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
        let path = file.path.display();
        tracing::warn!("{}: {what} `{path}` does not exist, going on without", file.origin);
        return Ok(None);
    }
    let advice = "this user must be able to read it";
    Err(unusable(file, what, advice, Some(error.into())))
}

/// All PEM sections of one kind; at least one.
fn read_pem<T: PemObject>(file: &NamedFile, what: &'static str) -> Result<Vec<T>, ConnInfoError> {
    let read = |path: &Path| -> Result<Vec<T>, pem::Error> { T::pem_file_iter(path)?.collect() };
    let found = read(&file.path).map_err(|error| {
        let advice = "this user must be able to read it, and it must be PEM";
        unusable(file, what, advice, Some(error.into()))
    })?;
    if found.is_empty() {
        return Err(unusable(file, what, "it holds none in PEM form", None));
    }
    Ok(found)
}

fn unusable(
    file: &NamedFile,
    what: &'static str,
    advice: &'static str,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
) -> ConnInfoError {
    ConnInfoError::File { origin: file.origin.clone(), what, path: file.path.clone(), advice, source }
}

/// Whether the certificate must be for the host that was named.
#[derive(Debug, Clone, Copy)]
enum HostName {
    Any,
    MustMatch,
}

#[derive(Debug)]
struct Trust {
    /// Chain, validity, revocation, and last of all the name.
    chain: Arc<WebPkiServerVerifier>,
    /// The root certificates as they came.
    trusted: Vec<CertificateDer<'static>>,
    host_name: HostName,
}

impl Trust {
    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let verdict = self.chain.verify_server_cert(certificate, intermediates, host, &[], now);
        match (verdict, self.host_name) {
            (Ok(_), HostName::Any | HostName::MustMatch) => Ok(()),
            // rustls looks at the name last: everything else was right.
            (
                Err(Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )),
                HostName::Any,
            ) => Ok(()),
            // The habit of `openssl req -x509`: one self-signed certificate is the server's and, in
            // a copy, the root. OpenSSL trusts it; webpki stops, after looking at its dates, at
            // its being an authority's. The very bytes that were put among the roots are trusted.
            (Err(Error::InvalidCertificate(CertificateError::Other(other))), host_name)
                if other.0.to_string() == "CaUsedAsEndEntity" && self.trusted.contains(certificate) =>
            {
                match host_name {
                    HostName::Any => Ok(()),
                    HostName::MustMatch => verify_server_name(&ParsedCertificate::try_from(certificate)?, host),
                }
            }
            (Err(error), HostName::Any | HostName::MustMatch) => Err(error),
        }
    }
}

/// Looks at the server's certificate as hard as the mode asks.
#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    trust: Option<Trust>,
    channel_binding_required: bool,
}

impl Verifier {
    /// Whether it matters that the server has the key of the certificate it shows. If any
    /// certificate will do, it doesn't, and webpki would refuse those of X.509 version 1, which
    /// the recipe in PostgreSQL's manual makes. But channel binding ties the log-in to a
    /// certificate, and would tie it to one that anybody can copy.
    fn needs_signature(&self) -> bool {
        self.trust.is_some() || self.channel_binding_required
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(trust) = &self.trust {
            trust.verify(end_entity, intermediates, server_name, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if !self.needs_signature() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if !self.needs_signature() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

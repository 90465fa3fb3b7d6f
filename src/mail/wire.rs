//! The connection to a mail server, and how much of a reply is read. lettre looks at the length of a line after it has read it whole.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lettre::transport::smtp::client::AsyncTokioStream;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The most that is read between two writes, bytes: a reply, or what a server sends of a TLS handshake at once, certificates included. lettre
/// parses a reply of many lines anew at each of them.
const LONGEST: usize = 32 << 10;

/// A stream that fails when the other side sends more than [`LONGEST`] without being asked anything.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    stream: S,
    peer: SocketAddr,
    /// Bytes read since the last write.
    read: usize,
}

/// Connects to a mail server; with `tls`, encrypted from the first byte, for the name `host`.
pub(super) async fn connect(
    host: &str,
    port: u16,
    tls: Option<&Arc<ClientConfig>>,
) -> io::Result<Box<dyn AsyncTokioStream>> {
    let stream = TcpStream::connect((host, port)).await?;
    let peer = stream.peer_addr()?;
    let Some(tls) = tls else { return Ok(Box::new(Bounded { stream, peer, read: 0 })) };
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let stream = tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?;
    Ok(Box::new(Bounded { stream, peer, read: 0 }))
}

/// Trusts the system's certificate authorities and those of `ca_file`.
///
/// # Errors
/// The file cannot be used; for people, without its name.
pub(super) fn tls(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(file) = ca_file {
        for certificate in CertificateDer::pem_file_iter(file).map_err(|error| error.to_string())? {
            let certificate = certificate.map_err(|error| error.to_string())?;
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
    }
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read > LONGEST {
            let why = format!("the server's reply is longer than {} KiB", LONGEST >> 10);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        this.read += buffer.filled().len() - before;
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.read = 0;
        Pin::new(&mut this.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin + std::fmt::Debug> AsyncTokioStream for Bounded<S> {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_comes_without_being_asked_for_is_read_up_to_a_limit() {
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let mut stream = Bounded { stream: near, peer: ([127, 0, 0, 1], 25).into(), read: 0 };
        let sending = async {
            let chunk = vec![b'x'; 1 << 10];
            while far.write_all(&chunk).await.is_ok() {}
        };
        let reading = async {
            let mut buffer = vec![0; 1 << 10];
            // Each question allows for a reply.
            for _ in 0..20 {
                let mut read = 0;
                while read < 20 << 10 {
                    read += stream.read(&mut buffer).await.unwrap();
                }
                stream.write_all(b"x").await.unwrap();
            }
            let mut read = 0;
            let error = loop {
                match stream.read(&mut buffer).await {
                    Ok(n) => read += n,
                    Err(error) => break error,
                }
            };
            assert!(read <= LONGEST + buffer.len(), "{read}");
            assert_eq!(error.to_string(), "the server's reply is longer than 32 KiB");
        };
        tokio::select! {
            () = sending => panic!("it goes on as long as somebody reads"),
            () = reading => {}
        }
    }
}

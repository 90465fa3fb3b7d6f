//! The kick port: every TCP connection is a wake, for writers whose NOTIFY cannot arrive (replicated rows, disabled triggers, old scripts).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::database::News;

/// Between two looks that kicks lead to: a flood comes to ten a second.
const FOLD: Duration = Duration::from_millis(100);

/// After the machine could not take a connection, when it has no file descriptors left for example.
const AGAIN: Duration = Duration::from_secs(1);

/// Opens the port.
///
/// # Errors
/// The address is not one of this machine's, or in use.
pub async fn open(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Takes kicks for ever. Nothing is read, and the connection is closed.
pub async fn run(port: TcpListener, news: Arc<News>) {
    let kicked = Notify::new();
    let listen = async {
        loop {
            match port.accept().await {
                Ok(_) => kicked.notify_one(),
                Err(error) => {
                    tracing::warn!("cannot take a connection to the kick port: {error}");
                    // It may have been a kick.
                    kicked.notify_one();
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    };
    let pass_on = async {
        loop {
            kicked.notified().await;
            news.kick();
            tokio::time::sleep(FOLD).await;
        }
    };
    tokio::join!(listen, pass_on);
}

//! A TCP proxy that misbehaves on order: it cuts, resets, stalls one direction or both, refuses.

use std::net::SocketAddr;

use buildreactor::embedded::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What it does with connections. What is stalled is kept, and delivered when it is healed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mood {
    /// Nothing passes from the client to the server, not even an end.
    pub stall_up: bool,
    /// Nothing passes from the server to the client.
    pub stall_down: bool,
    /// New connections are closed at once.
    pub refuse: bool,
    /// Closes the next connection that commits a result, before the server gets to hear of it, or before the client gets its answer.
    pub trap: Option<When>,
    /// Closes each connection that begins an attempt, likewise.
    pub trap_begin: Option<When>,
    /// Cuts off each client that begins an attempt; the server hears of the beginning when this is taken back.
    pub late_begin: bool,
    /// Closes each connection that commits and has sent this text before, before the client gets its answer.
    pub trap_after: Option<&'static str>,
    /// Stalls with the answer to the next beginning of an attempt.
    pub stall_begin: bool,
    /// Stalls with the next force call to a Buildbot master: before the server has it, or before the client has its answer.
    pub stall_force: Option<When>,
}

/// When a COMMIT, or the beginning of an attempt, is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    BeforeTheServer,
    BeforeTheAnswer,
}

/// How connections are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// FIN.
    Close,
    /// RST (SO_LINGER 0).
    Reset,
}

#[derive(Clone, Copy, Debug)]
struct Orders {
    mood: Mood,
    /// Connections made before are broken.
    breaks: u64,
    how: Break,
}

/// One proxy; gone when dropped, with its connections.
pub struct Proxy {
    port: u16,
    orders: watch::Sender<Orders>,
    acceptor: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// On a free port of 127.0.0.1, to `server`.
    pub async fn to(server: SocketAddr) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let orders = watch::Sender::new(Orders { mood: Mood::default(), breaks: 0, how: Break::Close });
        let (heard, told) = (orders.subscribe(), orders.clone());
        let acceptor = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let Ok((client, _)) = listener.accept().await else { continue };
                if heard.borrow().mood.refuse {
                    client.set_zero_linger().unwrap();
                    continue;
                }
                connections.spawn(pass(client, server, told.clone()));
            }
        });
        Proxy { port, orders, acceptor }
    }

    /// To a private server.
    pub async fn to_server(server: &Server) -> Proxy {
        Proxy::to(([127, 0, 0, 1], server.port()).into()).await
    }

    /// The server's database `postgres` by this way.
    pub fn url(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres", self.port())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, mood: Mood) {
        self.orders.send_modify(|orders| orders.mood = mood);
    }

    /// Waits until a force call, or the beginning of an attempt, has made it stall.
    pub async fn has_stalled(&self) {
        let mut heard = self.orders.subscribe();
        heard.wait_for(|orders| orders.mood.stall_up || orders.mood.stall_down).await.unwrap();
    }

    /// Breaks every connection there is.
    pub fn cut(&self, how: Break) {
        self.orders.send_modify(|orders| {
            orders.breaks += 1;
            orders.how = how;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn pass(mut client: TcpStream, server: SocketAddr, orders: watch::Sender<Orders>) {
    let mut heard = orders.subscribe();
    let breaks = heard.borrow().breaks;
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let late;
    {
        let (client_reads, client_writes) = client.split();
        let (server_reads, server_writes) = server.split();
        let up = pump(client_reads, server_writes, &orders, |mood| mood.stall_up, true);
        let down = pump(server_reads, client_writes, &orders, |mood| mood.stall_down, false);
        let up = async { up.await.map_or(Ok(()), Err) };
        late = tokio::select! {
            // What is broken while it stalls is not delivered, although it stalls no longer.
            biased;
            _ = heard.wait_for(|orders| orders.breaks != breaks) => None,
            passed = async { tokio::try_join!(up, async { down.await; Ok(()) }) } => match passed {
                Ok(_) => return,
                Err(late) => Some(late),
            },
        };
    }
    if let Some(late) = late {
        drop(client);
        if !late.is_empty() && heard.wait_for(|orders| !orders.mood.late_begin).await.is_ok() {
            server.write_all(&late).await.unwrap();
            // Not closed before the server has dealt with it.
            let _answer = server.read(&mut [0; 1 << 10]).await;
        }
        return;
    }
    if heard.borrow().how == Break::Reset {
        for stream in [&client, &server] {
            stream.set_zero_linger().unwrap();
        }
    }
}

const BEGIN_ATTEMPT: &str = include_str!("../../sql/queries/begin_attempt.sql");

/// Name of the statement that a message binds (Bind of the protocol: its length, a portal's name, and this).
fn bound(message: &[u8]) -> Option<&[u8]> {
    message.strip_prefix(b"B")?.get(4..)?.split(|byte| *byte == 0).nth(1)
}

/// Some: the trap has sprung, and this is still to be told to the server.
async fn pump(
    mut from: tokio::net::tcp::ReadHalf<'_>,
    mut to: tokio::net::tcp::WriteHalf<'_>,
    orders: &watch::Sender<Orders>,
    stalls: impl Fn(Mood) -> bool,
    watched: bool,
) -> Option<Vec<u8>> {
    let (mut heard, mut buffer) = (orders.subscribe(), vec![0; 1 << 14]);
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    let (mut results, mut said) = (false, false);
    let mut begins: Option<Vec<u8>> = None;
    loop {
        if heard.wait_for(|orders| !stalls(orders.mood)).await.is_err() {
            return None;
        }
        let n = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            _ = heard.changed() => continue,
        };
        // It may have been stalled meanwhile.
        if heard.wait_for(|orders| !stalls(orders.mood)).await.is_err() {
            return None;
        }
        if n == 0 {
            let _gone = to.shutdown().await;
            return None;
        }
        results |= watched && has(&buffer[..n], "SAVEPOINT result");
        let after = heard.borrow().mood.trap_after;
        said |= watched && after.is_some_and(|text| has(&buffer[..n], text));
        let mut trap = if results && has(&buffer[..n], "COMMIT\0") { heard.borrow().mood.trap } else { None };
        if said && after.is_some() && has(&buffer[..n], "COMMIT\0") {
            trap = Some(When::BeforeTheAnswer);
        }
        // A statement is parsed once a connection, under a name that is bound each time.
        if watched && buffer[0] == b'P' && has(&buffer[..n], BEGIN_ATTEMPT.lines().next().unwrap()) {
            begins = buffer[5..n].split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
        } else if begins.is_some() && bound(&buffer[..n]) == begins.as_deref() {
            if heard.borrow().mood.late_begin {
                return Some(buffer[..n].to_vec());
            }
            trap = heard.borrow().mood.trap_begin;
            orders.send_if_modified(|orders| {
                let stalls = std::mem::take(&mut orders.mood.stall_begin);
                orders.mood.stall_down |= stalls;
                stalls
            });
        }
        if watched && has(&buffer[..n], "\"method\":\"force\"") {
            orders.send_modify(|orders| match orders.mood.stall_force.take() {
                Some(When::BeforeTheServer) => orders.mood.stall_up = true,
                Some(When::BeforeTheAnswer) => orders.mood.stall_down = true,
                None => {}
            });
            if heard.wait_for(|orders| !stalls(orders.mood)).await.is_err() {
                return None;
            }
        }
        if trap == Some(When::BeforeTheServer) {
            return Some(Vec::new());
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return None;
        }
        if trap.is_some() {
            return Some(Vec::new());
        }
    }
}

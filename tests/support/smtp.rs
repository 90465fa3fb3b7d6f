//! A mail server that does as it is told, and remembers what it was given.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What the server does with one connection or letter, other than to take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answers this to the step (`connect`, `EHLO`, `STARTTLS`, `AUTH`, `MAIL`, `RCPT`, `DATA`, `end`).
    Say(&'static str, &'static str),
    /// Says nothing more from this step on; also at `handshake`, where the other side has heard that it may begin with TLS.
    Hang(&'static str),
    /// Ends the connection at this step; at `end`, with the whole letter.
    Cut(&'static str),
    /// Answers the step with this, again and again, without an end.
    Gush(&'static str, &'static str),
}

impl Fault {
    fn step(&self) -> &'static str {
        match self {
            Fault::Say(step, _) | Fault::Gush(step, _) | Fault::Hang(step) | Fault::Cut(step) => step,
        }
    }
}

/// One letter, whether or not it was taken.
#[derive(Clone, Debug)]
pub struct Got {
    pub from: String,
    pub to: String,
    pub data: Vec<u8>,
    /// It was answered with 250.
    pub taken: bool,
    pub encrypted: bool,
}

#[derive(Default)]
struct State {
    faults: VecDeque<Fault>,
    got: Vec<Got>,
    /// Commands without arguments, those of AUTH whole; whether they came encrypted.
    said: Vec<(String, bool)>,
    connections: usize,
    gushed: u64,
}

#[derive(Clone)]
pub struct Mailbox {
    state: Arc<Mutex<State>>,
    pub port: u16,
    /// While held, no letter is answered.
    pub gate: Arc<tokio::sync::RwLock<()>>,
}

/// How the server presents itself.
#[derive(Clone, Default)]
pub struct Manner {
    /// Certificate; offered with STARTTLS, or used from the first byte.
    pub tls: Option<TlsAcceptor>,
    pub implicit: bool,
    /// Offers AUTH with these.
    pub auth: Option<&'static str>,
}

/// A certificate for `localhost`, and the PEM of who signed it: itself.
pub fn certificate(name: &str) -> (TlsAcceptor, String) {
    let signed = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), signed.cert.pem())
}

impl Mailbox {
    pub async fn open(manner: Manner) -> Mailbox {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mailbox = Mailbox { state: Arc::default(), port, gate: Arc::default() };
        let (serving, manner) = (mailbox.clone(), Arc::new(manner));
        drop(tokio::task::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (mailbox, manner) = (serving.clone(), Arc::clone(&manner));
                mailbox.state.lock().unwrap().connections += 1;
                drop(tokio::task::spawn(async move { mailbox.serve(stream, &manner).await }));
            }
        }));
        mailbox
    }

    /// What happens next, one a letter or connection.
    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults.extend(faults);
    }

    pub fn faults_left(&self) -> usize {
        self.state.lock().unwrap().faults.len()
    }

    pub fn got(&self) -> Vec<Got> {
        self.state.lock().unwrap().got.clone()
    }

    pub fn taken(&self) -> Vec<Got> {
        self.got().into_iter().filter(|got| got.taken).collect()
    }

    pub fn said(&self) -> Vec<(String, bool)> {
        self.state.lock().unwrap().said.clone()
    }

    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    /// Bytes that were taken off it without an end in sight.
    pub fn gushed(&self) -> u64 {
        self.state.lock().unwrap().gushed
    }

    /// The fault that comes first, if it is of this step.
    fn fault(&self, step: &str) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
        let is_it = state.faults.front().is_some_and(|fault| fault.step() == step);
        if is_it { state.faults.pop_front() } else { None }
    }

    async fn serve(&self, stream: tokio::net::TcpStream, manner: &Manner) -> Option<()> {
        if let (Some(acceptor), true) = (&manner.tls, manner.implicit) {
            let stream = acceptor.accept(stream).await.ok()?;
            let mut stream = BufReader::new(stream);
            self.act(&mut stream, "connect", "220 test").await?;
            self.talk(&mut stream, manner, true).await;
            return Some(());
        }
        let mut stream = BufReader::new(stream);
        self.act(&mut stream, "connect", "220 test").await?;
        if self.talk(&mut stream, manner, false).await? {
            match self.fault("handshake") {
                Some(Fault::Hang(_)) => std::future::pending().await,
                Some(Fault::Cut(_)) => return None,
                Some(Fault::Say(..) | Fault::Gush(..)) | None => {}
            }
            let acceptor = manner.tls.as_ref()?;
            let stream = acceptor.accept(stream.into_inner()).await.ok()?;
            self.talk(&mut BufReader::new(stream), manner, true).await;
        }
        Some(())
    }

    /// Answers, or does what stands on the list. `None`: the connection ends.
    async fn act<S: AsyncWrite + Unpin>(&self, stream: &mut S, step: &str, usual: &str) -> Option<bool> {
        let (answer, good) = match self.fault(step) {
            None => (usual, true),
            Some(Fault::Say(_, answer)) => (answer, answer.starts_with('2')),
            Some(Fault::Hang(_)) => std::future::pending().await,
            Some(Fault::Cut(_)) => return None,
            Some(Fault::Gush(_, text)) => {
                let much = text.repeat((1 << 20) / text.len());
                loop {
                    stream.write_all(much.as_bytes()).await.ok()?;
                    let mut state = self.state.lock().unwrap();
                    state.gushed += much.len() as u64;
                }
            }
        };
        stream.write_all(format!("{answer}\r\n").as_bytes()).await.ok()?;
        stream.flush().await.ok()?;
        Some(good)
    }

    /// `Some(true)`: it goes on encrypted.
    async fn talk<S>(&self, stream: &mut BufReader<S>, manner: &Manner, encrypted: bool) -> Option<bool>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut from, mut to) = (String::new(), String::new());
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            let line = line.trim_end();
            let command = line.split([' ', ':']).next().unwrap().to_uppercase();
            let kept = if command == "AUTH" { line.to_owned() } else { command.clone() };
            self.state.lock().unwrap().said.push((kept, encrypted));
            let argument = || line.split_once(':').map(|(_, rest)| rest.split(['<', '>']).nth(1).unwrap().to_owned());
            match command.as_str() {
                "EHLO" => {
                    let mut lines = vec!["test".to_owned(), "8BITMIME".to_owned()];
                    if manner.tls.is_some() && !encrypted {
                        lines.push("STARTTLS".to_owned());
                    }
                    lines.extend(manner.auth.map(|mechanisms| format!("AUTH {mechanisms}")));
                    let last = lines.len() - 1;
                    let text: Vec<String> = lines
                        .iter()
                        .enumerate()
                        .map(|(n, line)| format!("250{}{line}", if n == last { ' ' } else { '-' }))
                        .collect();
                    self.act(stream, "EHLO", &text.join("\r\n")).await?;
                }
                "STARTTLS" => {
                    self.act(stream, "STARTTLS", "220 go on").await?;
                    return Some(true);
                }
                "AUTH" => {
                    if line.to_uppercase() == "AUTH LOGIN" {
                        for challenge in ["334 VXNlcm5hbWU6\r\n", "334 UGFzc3dvcmQ6\r\n"] {
                            stream.write_all(challenge.as_bytes()).await.ok()?;
                            stream.flush().await.ok()?;
                            let mut answer = String::new();
                            stream.read_line(&mut answer).await.ok()?;
                            self.state.lock().unwrap().said.push((answer.trim_end().to_owned(), encrypted));
                        }
                    }
                    self.act(stream, "AUTH", "235 welcome").await?;
                }
                "MAIL" => {
                    from = argument()?;
                    self.act(stream, "MAIL", "250 ok").await?;
                }
                "RCPT" => {
                    to = argument()?;
                    self.act(stream, "RCPT", "250 ok").await?;
                }
                "DATA" => {
                    if !self.act(stream, "DATA", "354 go on").await? {
                        continue;
                    }
                    let mut data = Vec::new();
                    loop {
                        let start = data.len();
                        if stream.read_until(b'\n', &mut data).await.ok()? == 0 {
                            return None;
                        }
                        if &data[start..] == b".\r\n" {
                            data.truncate(start);
                            break;
                        }
                        if data[start..].starts_with(b"..") {
                            data.remove(start);
                        }
                    }
                    let number = {
                        let mut state = self.state.lock().unwrap();
                        let (from, to) = (from.clone(), to.clone());
                        state.got.push(Got { from, to, data, taken: false, encrypted });
                        state.got.len() - 1
                    };
                    let _open = self.gate.read().await;
                    let taken = self.act(stream, "end", "250 taken").await?;
                    self.state.lock().unwrap().got[number].taken = taken;
                }
                "QUIT" => {
                    stream.write_all(b"221 bye\r\n").await.ok()?;
                    return None;
                }
                _ => drop(self.act(stream, &command, "250 ok").await?),
            }
        }
    }
}

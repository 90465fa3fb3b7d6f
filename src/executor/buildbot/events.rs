//! What a master tells as it happens: that a request is complete. A hint, as every wake: whoever follows a request reads it, told or not.
//! Nothing else is listened to: looks at each step would slow down a master that is about to build, on its only thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::master::Master;

/// Between two connections, from the first to the last.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

type Bells = Arc<Mutex<HashMap<u64, Arc<Notify>>>>;

/// Rings for requests of one master. Connected from the first request on.
pub struct Events {
    bells: Bells,
    wanted: Arc<Notify>,
    _listening: AbortOnDropHandle<()>,
}

/// Rings when its request is complete, or may have become so unheard.
pub struct Bell {
    bells: Bells,
    request: u64,
    /// Also keeps a ring that nobody waits for.
    pub rung: Arc<Notify>,
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.request);
    }
}

impl Events {
    /// Of `master`.
    pub fn new(master: Arc<Master>) -> Events {
        let (bells, wanted) = (Bells::default(), Arc::new(Notify::new()));
        let listening = crate::tasks::spawn(listen(master, Arc::clone(&bells), Arc::clone(&wanted)));
        Events { bells, wanted, _listening: listening }
    }

    /// Rings from now on. One bell a request.
    pub fn bell(&self, request: u64) -> Bell {
        let rung = Arc::new(Notify::new());
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).insert(request, Arc::clone(&rung));
        self.wanted.notify_one();
        Bell { bells: Arc::clone(&self.bells), request, rung }
    }
}

async fn listen(master: Arc<Master>, bells: Bells, wanted: Arc<Notify>) {
    let ring = |request: Option<u64>| {
        let bells = bells.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            Some(request) => bells.get(&request).into_iter().for_each(|bell| bell.notify_one()),
            None => bells.values().for_each(|bell| bell.notify_one()),
        }
    };
    let mut pause = AGAIN.0;
    loop {
        if bells.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            wanted.notified().await;
            continue;
        }
        match master.listen("buildrequests/*/complete").await {
            Ok(mut response) => {
                pause = AGAIN.0;
                // What happened before is not told.
                ring(None);
                let mut rest = Vec::new();
                loop {
                    match response.chunk().await {
                        Ok(Some(part)) => {
                            requests(&mut rest, &part).into_iter().for_each(|request| ring(Some(request)))
                        }
                        Ok(None) => break,
                        Err(error) => {
                            tracing::debug!(%error, "the events of master `{}` have ended", master.name);
                            break;
                        }
                    }
                }
                ring(None);
            }
            Err(error) => tracing::debug!("no events: {error}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN.1);
    }
}

/// The requests that the lines of `rest` and `part` tell of; what is not a whole line yet stays in `rest`.
fn requests(rest: &mut Vec<u8>, part: &[u8]) -> Vec<u64> {
    #[derive(Deserialize)]
    struct Event {
        message: Option<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        buildrequestid: u64,
    }
    // No event of a request is as long.
    const LONGEST: usize = 1 << 20;
    rest.extend_from_slice(part);
    let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else {
        if rest.len() > LONGEST {
            rest.clear();
        }
        return Vec::new();
    };
    let lines: Vec<u8> = rest.drain(..=end).collect();
    lines
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(b"data: "))
        .filter_map(|json| serde_json::from_slice::<Event>(json).ok()?.message)
        .map(|message| message.buildrequestid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_found_however_the_stream_is_cut() {
        let stream = b"event: handshake\r\ndata: 74bea090-1b82-432c-9342-a5e128a8303b\r\n\r\n\
            event: event\ndata: {\"key\":[\"buildrequests\",\"7\",\"claimed\"],\"message\":{\"buildrequestid\":7}}\n\n\
            event: event\ndata: {\"key\":[\"buildrequests\",\"8\",\"cancel\"],\"message\":null}\n\n\
            event: event\ndata: {\"key\":[\"buildrequests\",\"9\",\"complete\"],\"message\":{\"buildrequestid\":9}}\n\n";
        for size in 1..stream.len() {
            let (mut rest, mut found) = (Vec::new(), Vec::new());
            for part in stream.chunks(size) {
                found.extend(requests(&mut rest, part));
            }
            assert_eq!(found, [7, 9], "in parts of {size}");
        }
    }
}

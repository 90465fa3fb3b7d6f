//! Whether our sessions are sessions of the server, or dealt out by a pooler in between.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client};
use tokio_util::task::AbortOnDropHandle;

use super::one;
use crate::database::{ANSWER_TIME, ConnInfo, DatabaseError, Result, answered, connect};

/// What a session turned out to be.
pub(super) enum Kind {
    /// It keeps its server process and settings, and hears NOTIFY.
    Ours,
    /// Its server process, or its settings, were others in the next transaction.
    Shared,
    /// It does not hear NOTIFY.
    Deaf,
}

/// A connection as the server gives it, without settings of ours, and its notifications.
pub(super) struct Session {
    pub(super) client: Client,
    heard: Arc<Notify>,
    _driver: AbortOnDropHandle<()>,
}

impl Session {
    /// # Errors
    /// No connection.
    pub(super) async fn open(info: &ConnInfo) -> Result<Session> {
        let (client, mut connection) =
            tokio::time::timeout(ANSWER_TIME, connect(info, "buildreactor check"))
                .await
                .map_err(|_| DatabaseError::NoAnswer { step: "connect", after: ANSWER_TIME })??;
        let heard = Arc::new(Notify::new());
        let bell = Arc::clone(&heard);
        let driver = crate::tasks::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if matches!(message, AsyncMessage::Notification(_)) {
                    bell.notify_one();
                }
            }
        });
        Ok(Session { client, heard, _driver: driver })
    }

    /// Which server process answers, and the mark that it was given.
    async fn server_process(&self) -> Result<(i32, Option<String>)> {
        const SQL: &str = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.current_setting('buildreactor.check', true)";
        let row = one(&self.client, SQL).await?;
        Ok((row.get(0), row.get(1)))
    }

    /// Marks this session, keeps a second one in a transaction, and looks whether the mark stays.
    ///
    /// # Errors
    /// No second session, or the two cannot be used at once.
    pub(super) async fn kind(&self, info: &ConnInfo) -> Result<Kind> {
        const STEP: &str = "use two sessions";
        const MARK: &str =
            "SELECT pg_catalog.set_config('buildreactor.check', pg_catalog.gen_random_uuid()::pg_catalog.text, false)";
        let second = Session::open(info).await?;
        let mark: Option<String> = one(&self.client, MARK).await?.get(0);
        let (mut of_first, mut of_second) = (BTreeSet::new(), BTreeSet::new());
        // Some poolers deal server processes out in turn: a few rounds.
        for _ in 0..3 {
            of_first.insert(self.server_process().await?);
            answered(STEP, second.client.batch_execute("BEGIN")).await?;
            of_second.insert(second.server_process().await?);
            of_first.insert(self.server_process().await?);
            answered(STEP, second.client.batch_execute("COMMIT")).await?;
        }
        let marked = of_first.iter().all(|(_, seen)| *seen == mark);
        let processes: BTreeSet<i32> = of_first.iter().chain(&of_second).map(|(pid, _)| *pid).collect();
        if !marked || of_first.len() != 1 || of_second.len() != 1 || processes.len() != 2 {
            return Ok(Kind::Shared);
        }
        let channel = format!("buildreactor_check_{}", std::process::id());
        answered(STEP, self.client.batch_execute(&format!("LISTEN {channel}"))).await?;
        let notify = answered(STEP, second.client.prepare("SELECT pg_catalog.pg_notify($1, '')")).await?;
        answered(STEP, second.client.query(&notify, &[&channel])).await?;
        let heard = tokio::time::timeout(ANSWER_TIME, self.heard.notified()).await.is_ok();
        answered(STEP, self.client.batch_execute(&format!("UNLISTEN {channel}"))).await?;
        Ok(if heard { Kind::Ours } else { Kind::Deaf })
    }
}

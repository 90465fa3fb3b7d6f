//! What `buildreactor check` says of the lease chain between workers.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Asked, Findings, rows};
use crate::database::Result;
use crate::database::schema::Schema;
use crate::model::UNKNOWN_LEASE;

/// $1 text: this worker. The others that have not said goodbye, with their numbers in seconds, and how many running builds do not say by
/// which lease they live.
const LEASES: &str = "
    SELECT w.name, extract(epoch FROM w.lease)::float8 AS lease, extract(epoch FROM w.grace)::float8 AS grace,
           (SELECT count(*) FROM farm.builds b JOIN farm.build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
            WHERE b.state = 'running' AND b.worker = w.name AND a.lease IS NULL) AS silent
    FROM farm.workers w WHERE w.name <> $1 AND w.state <> 'stopped' ORDER BY w.name";

/// Where the numbers of other workers differ from this one's, and what follows.
pub(super) async fn leases(client: &Client, home: &Schema, asked: &Asked, found: &mut Findings) -> Result<()> {
    const SUBJECT: &str = "leases";
    let (lease, grace) = (asked.lease.as_secs_f64(), asked.grace.as_secs_f64());
    let own = format!("[lease] lease is {lease} s, grace {grace} s");
    let before = found.0.len();
    for row in rows(client, &home.sql(LEASES), &[(&asked.worker, Type::TEXT)]).await? {
        let name: &str = row.get("name");
        let numbers = row.get::<_, Option<f64>>("lease").zip(row.get::<_, Option<f64>>("grace"));
        match numbers {
            Some((its, its_grace)) if its != lease || its_grace != grace => {
                let ours = grace + (its - lease).max(0.0);
                let its_patience = its_grace + (lease - its).max(0.0);
                let text = format!(
                    "{own}, and {its} s and {its_grace} s at worker `{name}`: if it disappears, its builds start here after {ours} s, and this one's there after {its_patience} s"
                );
                found.note(SUBJECT, text);
            }
            Some(_) => {}
            None => {
                let text = format!(
                    "worker `{name}` is of a program older than the tables, and starts nothing more: install the one that migrated them, and restart it"
                );
                found.note(SUBJECT, text);
            }
        }
        let silent: i64 = row.get("silent");
        if silent > 0 {
            let text = format!(
                "{silent} running builds of worker `{name}` began under an older program, which did not write down their lease; {} s are taken for it. Were they longer: UPDATE build_attempts SET lease = '...' WHERE state = 'running' AND worker = '{name}' AND lease IS NULL;",
                UNKNOWN_LEASE.as_secs()
            );
            found.note(SUBJECT, text);
        }
    }
    if found.0.len() == before {
        found.ok(SUBJECT, format!("{own}, and no other worker's differ"));
    }
    Ok(())
}

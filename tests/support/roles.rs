//! The database as people with other roles have it.

use std::process::{Command, Stdio};

use super::{Db, psql_program, text};

impl Db {
    /// The database as another role sees it.
    pub fn url_as(&self, role: &str) -> String {
        assert!(self.url.contains("user=postgres"), "{}", self.url);
        self.url.replace("user=postgres", &format!("user={role}"))
    }

    /// What psql answers a role; its complaint where there is one.
    pub fn ask_as(&self, role: &str, sql: &str) -> String {
        let output = Command::new(psql_program())
            .args(["--no-psqlrc", "-qAt", "-d", &self.url_as(role), "-c", sql])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        text(if output.status.success() { &output.stdout } else { &output.stderr }).trim().to_owned()
    }

    /// With the roles of deploy/roles.sql, under names of this database's own, and somebody who can log in for each: `ann` an operator,
    /// `alice` and `bob` submitters, `daemon` a worker. Comes back with how their names end.
    pub fn with_roles(&self) -> String {
        let end = &self.name;
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/roles.sql");
        let names = ["worker", "submitter", "viewer", "operator"].map(|role| format!("{role}={role}_{end}"));
        let mut arguments = vec!["-q", "-f", file];
        for name in &names {
            arguments.extend(["-v", name]);
        }
        let output = self.psql(&arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let output = self.psql(&[
            "-q",
            "-c",
            &format!(
                "CREATE ROLE ann_{end} LOGIN IN ROLE operator_{end}; CREATE ROLE alice_{end} LOGIN IN ROLE submitter_{end};
                 CREATE ROLE bob_{end} LOGIN IN ROLE submitter_{end}; CREATE ROLE daemon_{end} LOGIN IN ROLE worker_{end}"
            ),
        ]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        end.clone()
    }
}

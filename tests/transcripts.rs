//! docs/queue.md says what psql says: its transcripts are run, a fresh database and a real worker for each section.
//!
//! `BUILDREACTOR_TEST_WRITE=1` writes the real output into the document instead of comparing it.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::support::{Daemon, Db, psql_program, server};

/// Who types: a role with rights on the tables and nothing else, as the prompt `=>` promises.
const PERSON: &str = "ann";

/// The worker of the examples.
const WORKER: &str = "anvil";

/// One psql session, fed statement by statement.
struct Psql {
    child: Child,
    input: ChildStdin,
    output: BufReader<PipeReader>,
}

impl Psql {
    fn start(db: &Db) -> Psql {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = Command::new(psql_program())
            .args(["--no-psqlrc", "-d"])
            .arg(db.url().replace("user=postgres", &format!("user={PERSON}")))
            .env("PGTZ", "UTC")
            // No statement of the document takes this long; JIT alone would.
            .env("PGOPTIONS", "-c statement_timeout=60s")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .expect("psql");
        let input = child.stdin.take().unwrap();
        Psql { child, input, output: BufReader::new(reader) }
    }

    /// What is printed for a statement, errors included, in the order in which it is printed.
    fn run(&mut self, statement: &str) -> String {
        const END: &str = "the statement is over";
        writeln!(self.input, "{statement}\n\\warn '{END}'").unwrap();
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "psql has left: {printed}");
            if line.trim_end() == END {
                return printed;
            }
            printed.push_str(&line);
        }
    }

    fn end(mut self) {
        drop(self.input);
        assert!(self.child.wait().unwrap().success());
    }
}

/// What psql would show before the line that follows these: it knows open parentheses and quotes.
fn prompt(before: &[&str]) -> String {
    let (mut depth, mut quoted) = (0, false);
    for letter in before.iter().flat_map(|line| line.chars()) {
        match letter {
            '\'' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth -= 1,
            _ => {}
        }
    }
    let sign = match (before.is_empty(), quoted, depth > 0) {
        (true, _, _) => '=',
        (false, true, _) => '\'',
        (false, false, true) => '(',
        (false, false, false) => '-',
    };
    format!("builds{sign}> ")
}

/// The statements of a transcript, each as its lines.
fn statements(transcript: &[&str]) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    for line in transcript {
        if let Some(first) = line.strip_prefix("builds=> ") {
            found.push(vec![first.to_owned()]);
        } else if let Some((_, more)) = ["builds-> ", "builds(> ", "builds'> "]
            .iter()
            .find_map(|sign| line.strip_prefix(sign).map(|more| (sign, more)))
        {
            found.last_mut().expect("a first line before the second").push(more.to_owned());
        }
    }
    found
}

/// A transcript as psql would print it now.
fn real_transcript(db: &Db, written: &[&str]) -> Vec<String> {
    let mut psql = Psql::start(db);
    let mut real = String::new();
    for statement in statements(written) {
        let lines: Vec<&str> = statement.iter().map(String::as_str).collect();
        for (n, line) in lines.iter().enumerate() {
            real.push_str(&format!("{}{line}\n", prompt(&lines[..n])));
        }
        let mut said = psql.run(&statement.join("\n"));
        if said.contains("lock timeout") {
            // The worker, on a busy machine, had not heard in time that somebody waits for a row that it holds.
            said = psql.run(&statement.join("\n"));
        }
        real.push_str(&said);
    }
    psql.end();
    real.trim_end_matches('\n').lines().map(str::to_owned).collect()
}

/// The lines that differ, with two before and after them.
fn difference(written: &[&str], real: &[&str]) -> String {
    let same = |pairs: &mut dyn Iterator<Item = (&&str, &&str)>| pairs.take_while(|(a, b)| a == b).count();
    let head = same(&mut written.iter().zip(real));
    let shorter = written.len().min(real.len());
    let tail = same(&mut written.iter().rev().zip(real.iter().rev())).min(shorter - head);
    let mut shown = Vec::new();
    shown.extend(written[head.saturating_sub(2)..head].iter().map(|line| format!("  {line}")));
    shown.extend(written[head..written.len() - tail].iter().map(|line| format!("- {line}")));
    shown.extend(real[head..real.len() - tail].iter().map(|line| format!("+ {line}")));
    shown.extend(real[real.len() - tail..].iter().take(2).map(|line| format!("  {line}")));
    shown.join("\n")
}

/// A database as the sections find it, with its worker.
async fn section() -> (Db, Daemon) {
    let db = Db::new().await;
    db.execute(&format!(
        "DO $$ BEGIN CREATE ROLE {PERSON} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {PERSON};
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {PERSON}"
    ))
    .await;
    let daemon = Daemon::start(&db, WORKER, &[("BUILDREACTOR_REACTOR_POLL", "1h")]).await;
    (db, daemon)
}

/// The document with what psql really prints in its transcripts.
async fn performed(document: &str) -> Vec<String> {
    let mut lines = document.lines();
    let mut performed: Vec<String> = Vec::new();
    let mut stage: Option<(Db, Daemon)> = None;
    while let Some(line) = lines.next() {
        performed.push(line.to_owned());
        if line.starts_with("## ") {
            // The worker goes before its database.
            if let Some((db, daemon)) = stage.take() {
                drop(daemon);
                drop(db);
            }
            stage = Some(section().await);
        } else if line.starts_with("<!-- ") {
            let mut comment = line.to_owned();
            while !comment.ends_with("-->") {
                let more = lines.next().expect("an end of the comment");
                performed.push(more.to_owned());
                comment = format!("{comment}\n{more}");
            }
            let said = comment.trim_start_matches("<!-- ").trim_end_matches("-->").trim();
            let (db, _) = stage.as_ref().expect("a section");
            match said.split_once(": ") {
                Some(("setup", sql)) => db.execute(sql).await,
                Some(("wait", sql)) => db.wait(sql).await,
                Some(_) | None => panic!("neither setup nor wait: {said}"),
            }
        } else if line == "```psql" {
            let written: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            let (db, _) = stage.as_ref().expect("a section");
            performed.extend(real_transcript(db, &written));
            performed.push("```".to_owned());
        }
    }
    if let Some((db, daemon)) = stage {
        drop(daemon);
        drop(db);
    }
    performed
}

#[tokio::test]
async fn the_guide_to_the_queue_shows_what_psql_prints() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/queue.md");
    let document = std::fs::read_to_string(&path).unwrap();
    assert!(server().bin_dir().exists());
    let real = performed(&document).await;
    if std::env::var_os("BUILDREACTOR_TEST_WRITE").is_some() {
        std::fs::write(&path, real.join("\n") + "\n").unwrap();
        return;
    }
    let (written, real): (Vec<&str>, Vec<&str>) =
        (document.lines().collect(), real.iter().map(String::as_str).collect());
    assert!(
        written == real,
        "docs/queue.md (-) is not what psql prints (+); BUILDREACTOR_TEST_WRITE=1 writes it anew\n{}",
        difference(&written, &real)
    );
}

#[test]
fn a_prompt_is_the_one_that_psql_would_show() {
    assert_eq!(prompt(&[]), "builds=> ");
    assert_eq!(prompt(&["SELECT 1"]), "builds-> ");
    assert_eq!(prompt(&["WITH a AS (", "  SELECT ')'"]), "builds(> ");
    assert_eq!(prompt(&["SELECT 'a"]), "builds'> ");
    assert_eq!(difference(&["a", "b", "c"], &["a", "x", "y", "c"]), "  a\n- b\n+ x\n+ y\n  c");
}

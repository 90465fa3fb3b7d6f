//! What the text of builds and of other people may do to a terminal: colours, and nothing else.

use std::process::{Command, Stdio};

use crate::commands_watch::Beside;
use crate::support::{Db, PROGRAM, buildreactor, text};

/// Each of these does something to a terminal, or shows a text as another one.
const EVIL: &[&str] = &[
    "\u{1b}]0;title\u{7}",
    "\u{1b}]52;c;aGk=\u{1b}\\",
    "\u{1b}]8;;http://example.org\u{1b}\\",
    "\u{1b}[2J\u{1b}[H",
    "\u{1b}[8m",
    "\u{1b}[>4;2m",
    "\u{1b}c",
    "\u{9b}2J",
    "\u{9d}0;title\u{9c}",
    "\u{202e}",
    "\u{2066}",
    "\u{200b}",
    "\u{feff}",
    "\u{61c}",
    "\u{2028}",
    "\u{e0041}",
    "\u{7f}\u{8}",
];

fn evil() -> String {
    EVIL.join(" x ")
}

/// `script` gives the command a terminal.
fn terminal(db: &Db, arguments: &str) -> Command {
    let mut command = Command::new("script");
    command.args(["-qefc", &format!("stty cols 200 rows 50; {PROGRAM} {arguments}"), "/dev/null"]);
    command.envs([("BUILDREACTOR_DATABASE_URL", db.url().as_str()), ("TERM", "xterm"), ("LC_ALL", "C.UTF-8")]);
    command.env_remove("DATABASE_URL").stdin(Stdio::null());
    command
}

/// What a terminal gets from a command.
fn on_terminal(db: &Db, arguments: &str) -> String {
    text(&terminal(db, arguments).output().expect("`script`, of util-linux").stdout)
}

/// Nothing in it but text, line ends and colours; and, where a program of ours draws, its own movements of the cursor.
fn assert_harmless(shown: &str, drawn: bool) {
    let mut rest = shown;
    while let Some(at) = rest.find(|c: char| c.is_control() && !"\n\t".contains(c) || EVIL[9..16].concat().contains(c))
    {
        let here = &rest[at..];
        let passed = if let Some(parameters) = here.strip_prefix("\u{1b}[") {
            let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap();
            let hides = parameters[..end].split(';').any(|one| one == "8") && !parameters.starts_with("38;5;");
            let movement = drawn && (parameters[end..].starts_with(['A', 'B']) || parameters.starts_with("2K"));
            (movement || parameters[end..].starts_with('m') && !hides).then_some(end + 3)
        } else {
            (here.starts_with("\r\n") || drawn && here.starts_with('\r')).then_some(1)
        };
        let Some(passed) = passed else { panic!("{:?} in {shown:?}", here.chars().take(20).collect::<String>()) };
        rest = &here[passed..];
    }
}

async fn build(db: &Db) -> String {
    db.builder("b", "true").await;
    let id: i64 = db.one("INSERT INTO builds (builder) VALUES ('b') RETURNING id").await;
    db.execute(&format!(
        "UPDATE builds SET state = 'running', attempt = 1, worker = 'w', queued_at = now(), started_at = now() WHERE id = {id};
         INSERT INTO build_attempts (build_id, attempt, worker, started_at) VALUES ({id}, 1, 'w', now())"
    ))
    .await;
    id.to_string()
}

async fn write(db: &Db, id: &str, seq: i32, content: &str) {
    let content = content.replace('\'', "''");
    let sql = format!("INSERT INTO build_log (build_id, attempt, seq, content) VALUES ({id}, 1, {seq}, '{content}')");
    db.execute(&sql).await;
}

#[tokio::test]
async fn a_log_on_a_terminal_has_its_colours_and_nothing_else() {
    let db = Db::new().await;
    let id = build(&db).await;
    let log = format!("\u{1b}[1;31mred\u{1b}[0m \u{1b}[38;5;8mgrey\u{1b}[m {}\n10%\r20%\r\nlast \u{1b}[32m", evil());
    // Cut within sequences too.
    let letters: Vec<char> = log.chars().collect();
    for (seq, piece) in (1..).zip(letters.chunks(7)) {
        write(&db, &id, seq, &piece.iter().collect::<String>()).await;
    }
    let shown = on_terminal(&db, &format!("log {id}"));
    assert_harmless(&shown, false);
    for part in
        ["\u{1b}[1;31mred\u{1b}[0m \u{1b}[38;5;8mgrey\u{1b}[m ^[]0;title^G x ", " x <U+202E> x ", "\n10%^M\r\n20%\r\n"]
    {
        assert!(shown.contains(part), "{part:?} in {shown:?}");
    }
    assert!(shown.ends_with("last \u{1b}[32m\u{1b}[0m"), "{shown:?}");
    // With a flag, and into a pipe, as it is. The terminal makes its own line ends.
    assert_eq!(on_terminal(&db, &format!("log {id} --raw")), log.replace('\n', "\r\n"));
    assert_eq!(text(&buildreactor(&["log", &id], &[("BUILDREACTOR_DATABASE_URL", &db.url())]).stdout), log);
}

#[tokio::test]
async fn whoever_watches_sees_others_texts_and_is_not_deceived() {
    let db = Db::new().await;
    let running = build(&db).await;
    write(&db, &running, 1, &format!("{}\n", evil())).await;
    // Whoever may write to these tables may write anything.
    let evil = evil();
    db.execute(&format!(
        "UPDATE build_attempts SET worker = 'w{evil}';
         UPDATE builds SET worker = 'w{evil}';
         INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, detail)
             VALUES ('b', 'failed', 1, 'w{evil}', now(), now(), now(), 'd{evil}');
         INSERT INTO builders (name, script, paused, paused_reason) VALUES ('paused', 'true', true, 'p{evil}');
         INSERT INTO build_queue (builder) VALUES ('paused');
         INSERT INTO build_steps (build_id, attempt, position, name, state, detail) VALUES (1, 1, 1, 's{evil}', 'failed', 'd{evil}');
         UPDATE build_attempts SET external_url = 'http://u{evil}', external_worker = 'w{evil}'"
    ))
    .await;
    for arguments in ["watch --once", "watch 1 --once", "watch 2 --once", "watch 3 --once", "log 3", "log 2 -f"] {
        let shown = on_terminal(&db, arguments);
        assert_harmless(&shown, false);
        assert!(!shown.contains("title") || shown.contains("<U+202E>"), "{arguments}: {shown:?}");
        let words: Vec<&str> = arguments.split(' ').collect();
        let output = buildreactor(&words, &[("BUILDREACTOR_DATABASE_URL", &db.url())]);
        let piped = text(&output.stdout) + &text(&output.stderr);
        assert_harmless(&piped, false);
    }
    assert!(on_terminal(&db, "watch 2").contains("<U+202E>"));
    for arguments in ["watch", "watch 1", "watch 3"] {
        let live = Beside::run(terminal(&db, arguments));
        live.prints("<U+202E>").await;
        assert_harmless(&live.out(), true);
    }
}

#[tokio::test]
async fn errors_of_the_database_do_nothing_to_a_terminal() {
    let db = Db::new().await;
    let id = build(&db).await;
    write(&db, &id, 1, "text").await;
    db.execute(&format!(
        "CREATE FUNCTION boom() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '%', '{}'; END $$;
         ALTER TABLE build_log RENAME TO hidden;
         CREATE VIEW build_log AS SELECT * FROM hidden WHERE boom()",
        evil()
    ))
    .await;
    for arguments in [format!("log {id}"), "check".to_owned()] {
        let shown = on_terminal(&db, &arguments);
        assert_harmless(&shown, false);
        assert!(arguments == "check" || shown.contains("^[]0;title^G") && shown.contains("<U+202E>"), "{shown:?}");
    }
}

#[tokio::test]
async fn the_log_of_a_daemon_does_nothing_to_its_terminal() {
    let db = Db::new().await;
    let state = crate::support::temp_dir();
    db.execute(&format!(
        "CREATE FUNCTION boom() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '%', E'two\\nlines {}'; END $$;
         INSERT INTO builders (name, script) VALUES ('b', 'true');
         CREATE TRIGGER boom BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'running') EXECUTE FUNCTION boom();
         INSERT INTO build_queue (builder) VALUES ('b')",
        evil()
    ))
    .await;
    let mut terminal = terminal(&db, "run");
    terminal.env("BUILDREACTOR_WORKER_STATE_DIR", state.path());
    let daemon = Beside::run(terminal);
    daemon.prints("<U+E0041>").await;
    let shown = daemon.out();
    assert_harmless(&shown, false);
    assert!(shown.contains("two") && shown.contains("<U+202E>"), "{shown:?}");
}

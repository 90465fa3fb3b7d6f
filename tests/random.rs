//! A thousand random operations from four sessions over three daemons that are killed now and then, and a model of what may come of it.
//! `BUILDREACTOR_TEST_SEED` and `BUILDREACTOR_TEST_OPERATIONS` choose others; a failure prints the seed and what was done to the build.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::dice::Random;
use crate::support::{Daemon, Db, processes_of, temp_dir, wait_for};

/// name, `max_running`, `retry_failed`.
const BUILDERS: [(&str, i64, i64); 5] = [("b0", 1, 0), ("b1", 2, 1), ("b2", 3, 0), ("b3", 2, 0), ("b4", 3, 1)];
const MAX_ATTEMPTS: usize = 3;
const SESSIONS: u64 = 4;
const KILL_EVERY: u64 = 150;

/// What the test asked of a build.
#[derive(Default)]
struct Asked {
    builder: &'static str,
    end: &'static str,
    keys: Vec<String>,
    needs: Vec<i64>,
    /// `cancel_build` or DELETE was tried, and one of them said that it ended the build.
    stop: bool,
    stopped: bool,
    /// `retry_build` or another INSERT of its id was tried so often.
    again: usize,
    done: Vec<String>,
}

#[derive(Default)]
struct Model {
    builds: BTreeMap<i64, Asked>,
    errors: Vec<String>,
}

type Shared = Arc<Mutex<Model>>;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// One of the last `among` builds.
fn some_build(model: &Shared, random: &mut Random, among: usize) -> Option<i64> {
    let model = model.lock().unwrap();
    let last: Vec<i64> = model.builds.keys().rev().take(among).copied().collect();
    if last.is_empty() { None } else { Some(*random.of(&last)) }
}

struct Session {
    client: Client,
    random: Random,
    model: Shared,
}

impl Session {
    /// Runs it, and notes it with the build and what it said. Errors with an `allowed` SQLSTATE are answers as well.
    async fn run(&self, sql: &str, build: Option<i64>, allowed: &[&str]) -> Option<tokio_postgres::Row> {
        let began = Instant::now();
        let result = self.client.query_opt(sql, &[]).await;
        let mut model = self.model.lock().unwrap();
        let (said, row) = match result {
            Ok(row) => (format!("{} row", row.iter().len()), row),
            Err(error) => {
                let Some(refusal) = error.as_db_error() else { panic!("{sql}: {error:?}") };
                let text = format!("{}: {}", refusal.code().code(), refusal.message());
                let names_it = refusal.code().code() != "55006"
                    || refusal.message().contains("is running")
                        && refusal.hint().is_some_and(|h| h.contains("cancel_build("));
                if !allowed.contains(&refusal.code().code()) || !names_it {
                    let report = format!("{sql}\n  {text} {:?} {:?}", refusal.detail(), refusal.where_());
                    println!("unexpected error after {:?}: {report}", began.elapsed());
                    model.errors.push(report);
                }
                (text, None)
            }
        };
        if let Some(asked) = build.and_then(|id| model.builds.get_mut(&id)) {
            asked.done.push(format!("{sql} -> {said}, {:?}", began.elapsed()));
        }
        row
    }

    fn plan(&mut self) -> (Asked, String) {
        let builder = self.random.of(&BUILDERS).0;
        let end = match self.random.below(100) {
            0..15 => "fail",
            15..23 => "flaky",
            23..28 => "again",
            _ => "pass",
        };
        let sleep = self.random.of(&["0", "0", "0.1", "0.3"]);
        (Asked { builder, end, ..Asked::default() }, format!("'{{\"end\": \"{end}\", \"sleep\": \"{sleep}\"}}'"))
    }

    async fn insert(&mut self, with: u64) {
        let (mut asked, properties) = self.plan();
        let (mut columns, mut values) = (String::new(), String::new());
        let mut add = |column: &str, value: &str| {
            write!(columns, ", {column}").unwrap();
            write!(values, ", {value}").unwrap();
        };
        match with {
            0 => add("priority", &self.random.below(5).to_string()),
            1 => {
                for _ in 0..=self.random.below(3) {
                    asked.needs.extend(some_build(&self.model, &mut self.random, 15));
                }
                asked.needs.sort_unstable();
                asked.needs.dedup();
                let list: Vec<String> = asked.needs.iter().map(ToString::to_string).collect();
                add("needs", &format!("'{{{}}}'", list.join(",")));
            }
            2 => {
                asked.keys.push(self.random.of(&["main", "next"]).to_string());
                add("coalesce_key", &format!("'{}'", asked.keys[0]));
            }
            3 => add("run_after", &format!("now() + interval '{} ms'", self.random.below(2000))),
            _ => {}
        }
        let sql = format!(
            "INSERT INTO build_queue (builder, properties{columns}) VALUES ('{}', {properties}{values}) RETURNING build_id",
            asked.builder
        );
        if let Some(row) = self.run(&sql, None, &[]).await {
            asked.done.push(sql);
            self.model.lock().unwrap().builds.insert(row.get(0), asked);
        }
    }

    async fn insert_pair(&mut self) {
        let ((mut first, one), (mut second, two)) = (self.plan(), self.plan());
        let sql = format!(
            "WITH c AS (INSERT INTO build_queue (builder, properties) VALUES ('{}', {one}) RETURNING build_id)
             INSERT INTO build_queue (builder, properties, needs) SELECT '{}', {two}, ARRAY[build_id] FROM c RETURNING build_id, needs",
            first.builder, second.builder
        );
        if let Some(row) = self.run(&sql, None, &[]).await {
            second.needs = row.get(1);
            first.done.push(sql.clone());
            second.done.push(sql);
            let mut model = self.model.lock().unwrap();
            model.builds.insert(second.needs[0], first);
            model.builds.insert(row.get(0), second);
        }
    }

    /// Notes beforehand what is about to be asked of a build.
    fn note(&self, build: i64, change: impl FnOnce(&mut Asked)) {
        change(self.model.lock().unwrap().builds.get_mut(&build).unwrap());
    }

    async fn operation(&mut self) {
        let kind = self.random.below(100);
        match kind {
            0..15 => return self.insert(9).await,
            15..20 => return self.insert(0).await,
            20..38 => return self.insert(1).await,
            38..50 => return self.insert(2).await,
            50..55 => return self.insert(3).await,
            55..61 => return self.insert_pair().await,
            61..67 => {
                let (name, what) =
                    (self.random.of(&BUILDERS).0, if self.random.below(3) == 0 { "pause" } else { "resume" });
                self.run(&format!("SELECT {what}_builder('{name}')"), None, &[]).await;
                return;
            }
            _ => {}
        }
        let Some(id) = some_build(&self.model, &mut self.random, 40) else { return };
        match kind {
            67..76 => {
                self.note(id, |asked| asked.stop = true);
                let row = self.run(&format!("SELECT cancel_build({id}, 'test')"), Some(id), &[]).await;
                if row.is_some_and(|row| row.get::<_, String>(0) == "cancelled") {
                    self.note(id, |asked| asked.stopped = true);
                }
            }
            76..82 => {
                let sql = format!("SELECT prioritize_build({id}, {})", self.random.below(10));
                self.run(&sql, Some(id), &[]).await;
            }
            82..88 => {
                self.note(id, |asked| asked.again += 1);
                self.run(&format!("SELECT retry_build({id})"), Some(id), &[]).await;
            }
            88..90 => {
                let key = *self.random.of(&["main", "next"]);
                self.note(id, |asked| {
                    asked.again += 1;
                    asked.keys.push(key.to_owned());
                });
                // It may wait or run already.
                let sql = format!("INSERT INTO build_queue (build_id, coalesce_key) VALUES ({id}, '{key}')");
                self.run(&sql, Some(id), &["23505"]).await;
            }
            90..95 => {
                self.note(id, |asked| asked.stop = true);
                let sql = format!("DELETE FROM build_queue WHERE build_id = {id} RETURNING 'deleted'");
                if self.run(&sql, Some(id), &["55006", "55P03"]).await.is_some() {
                    self.note(id, |asked| asked.stopped = true);
                }
            }
            _ => {
                let set = match self.random.below(3) {
                    0 => "priority = 3".to_owned(),
                    1 => "reason = 'changed'".to_owned(),
                    _ => format!("run_after = now() + interval '{} ms'", self.random.below(1000)),
                };
                let sql = format!("UPDATE build_queue SET {set} WHERE build_id = {id}");
                self.run(&sql, Some(id), &["55006", "55P03"]).await;
            }
        }
    }
}

fn look_at_log(daemon: &Daemon, errors: &Shared) {
    for line in daemon.log.lock().unwrap().iter().filter(|line| line.contains("panicked") || line.contains("deadlock"))
    {
        println!("a daemon says: {line}");
        errors.lock().unwrap().errors.push(line.clone());
    }
}

/// Starts a killed one again; while the server still has its predecessor's session, it waits.
async fn start_again(daemon: &mut Daemon) {
    daemon.spawn_again();
    daemon.ready().await;
}

struct Attempt {
    state: String,
    exit_code: Option<i32>,
    started: f64,
    finished: f64,
    /// Belongs to the last queueing.
    counts: bool,
}

struct Build {
    builder: String,
    state: String,
    needs: Vec<i64>,
    superseded_by: Option<i64>,
    finished: f64,
    attempts: Vec<Attempt>,
}

async fn read_builds(db: &Db) -> BTreeMap<i64, Build> {
    let session = db.session().await;
    let mut builds = BTreeMap::new();
    const BUILDS: &str = "SELECT id, builder, state::text, attempt, needs, superseded_by, extract(epoch FROM finished_at)::float8 FROM builds";
    for row in session.query(BUILDS, &[]).await.unwrap() {
        let build = Build {
            builder: row.get(1),
            state: row.get(2),
            needs: row.get(4),
            superseded_by: row.get(5),
            finished: row.get(6),
            attempts: Vec::new(),
        };
        builds.insert(row.get::<_, i64>(0), build);
    }
    const ATTEMPTS: &str =
        "SELECT a.build_id, a.attempt, a.state::text, a.exit_code, extract(epoch FROM a.started_at)::float8,
            coalesce(extract(epoch FROM a.finished_at), 'infinity')::float8, a.started_at >= b.queued_at, b.attempt
        FROM build_attempts a JOIN builds b ON b.id = a.build_id ORDER BY 1, 2";
    let mut last = HashMap::new();
    for row in session.query(ATTEMPTS, &[]).await.unwrap() {
        let build = builds.get_mut(&row.get::<_, i64>(0)).unwrap();
        build.attempts.push(Attempt {
            state: row.get(2),
            exit_code: row.get(3),
            started: row.get(4),
            finished: row.get(5),
            counts: row.get(6),
        });
        assert_eq!(
            usize::try_from(row.get::<_, i32>(1)).unwrap(),
            build.attempts.len(),
            "attempts are numbered from 1"
        );
        last.insert(row.get::<_, i64>(0), row.get::<_, i32>(7));
    }
    for (id, attempt) in last {
        assert_eq!(usize::try_from(attempt).unwrap(), builds[&id].attempts.len(), "attempts of build {id}");
    }
    builds
}

/// The build that stands for this one, and whether the test queued any on the way again.
fn stands_for(id: i64, builds: &BTreeMap<i64, Build>, model: &Model) -> (i64, bool) {
    let (mut at, mut again) = (id, false);
    for _ in 0..=builds.len() {
        again |= model.builds.get(&at).is_none_or(|asked| asked.again > 0);
        match builds[&at].superseded_by {
            Some(next) if builds.contains_key(&next) => at = next,
            _ => return (at, again),
        }
    }
    panic!("superseded_by goes round from build {id}");
}

/// What is wrong with a build, as far as it alone and those it names can tell.
fn wrong(id: i64, builds: &BTreeMap<i64, Build>, model: &Model, trace: &[(char, usize)]) -> Vec<String> {
    let (build, asked) = (&builds[&id], &model.builds[&id]);
    let mut wrong = Vec::new();
    let mut check = |good: bool, what: &str| {
        if !good {
            wrong.push(what.to_owned());
        }
    };
    let retry_failed = BUILDERS.iter().find(|(name, ..)| *name == build.builder).unwrap().2;
    let count = |states: &[&str]| build.attempts.iter().filter(|a| a.counts && states.contains(&&*a.state)).count();
    check(build.builder == asked.builder, "its builder");
    check(build.needs == asked.needs, "its needs");

    // The verdict.
    let last = build.attempts.last().map_or("none", |attempt| &attempt.state);
    match &*build.state {
        "passed" => {
            check(last == "passed", "passed, though its last attempt did not");
            let failed_before = build.attempts.iter().any(|a| a.state != "passed");
            check(
                ["pass", "again"].contains(&asked.end) || asked.end == "flaky" && failed_before,
                "passed, though it must not",
            );
        }
        "failed" => {
            check(last == "failed", "failed, though its last attempt did not");
            check(["fail", "flaky"].contains(&asked.end), "failed, though it must not");
            check(
                asked.stop || count(&["failed"]) == usize::try_from(retry_failed).unwrap() + 1,
                "failed in another number of tries",
            );
        }
        "cancelled" => check(asked.stop, "cancelled by nobody"),
        "error" => check(count(&["error", "lost"]) == MAX_ATTEMPTS, "given up in another number of tries"),
        "superseded" => {
            let by = build.superseded_by.filter(|by| *by != id).and_then(|by| Some((builds.get(&by)?, by)));
            check(
                by.is_some_and(|(newer, by)| {
                    newer.builder == build.builder && model.builds[&by].keys.iter().any(|key| asked.keys.contains(key))
                }),
                "superseded by none of its key",
            );
            check(builds[&stands_for(id, builds, model).0].state != "superseded", "superseded without end");
        }
        "skipped" => {}
        _ => check(false, "not in a final state"),
    }
    check(!asked.stopped || asked.again > 0 || build.state == "cancelled", "was told to be cancelled, and is not");

    // Its needs.
    let needs: Vec<(i64, bool)> = build.needs.iter().map(|need| stands_for(*need, builds, model)).collect();
    if asked.again == 0 && needs.iter().all(|(_, again)| !again) {
        let broken = needs.iter().any(|(need, _)| builds[need].state != "passed");
        check(build.state != "skipped" || broken, "skipped, though all its needs passed");
        if let Some(attempt) = build.attempts.first() {
            check(!broken, "ran, though not all its needs passed");
            let after = needs.iter().all(|(need, _)| builds[need].finished <= attempt.started);
            check(after, "started before its needs had passed");
        }
    }

    // Its attempts, and what they left outside.
    let mut extra = 0;
    for (at, attempt) in build.attempts.iter().enumerate() {
        let lines = |what| trace.iter().filter(|line| **line == (what, at + 1)).count();
        let (starts, ends) = (lines('S'), lines('E'));
        check(starts <= 1 && ends <= starts, "an attempt ran twice");
        match &*attempt.state {
            "passed" | "failed" | "error" => {
                check(starts == 1 && ends == 1, "an attempt with a verdict did not run to its end");
                let exit = match &*attempt.state {
                    "passed" => 0,
                    "failed" => 1,
                    _ => 75,
                };
                check(attempt.exit_code == Some(exit), "an attempt's exit code");
            }
            "lost" | "cancelled" => {}
            _ => check(false, "an attempt's state"),
        }
        check(attempt.started <= attempt.finished, "an attempt ended before it started");
        if let Some(next) = build.attempts.get(at + 1) {
            check(attempt.finished <= next.started, "two attempts overlap");
            let reason = ["error", "lost", "cancelled"].contains(&&*attempt.state)
                || attempt.state == "failed" && retry_failed > 0;
            extra += usize::from(!reason);
        }
    }
    check(extra <= asked.again, "ran again without a reason");
    check(trace.iter().all(|(_, attempt)| (1..=build.attempts.len()).contains(attempt)), "an attempt nobody recorded");
    // Start, end, start, end: an end may be missing, and the next has a higher number.
    let in_order = trace.windows(2).all(|two| {
        let ((_, before), (what, after)) = (two[0], two[1]);
        if what == 'S' { after > before } else { two[0] == ('S', after) }
    });
    check(in_order, "the order of its side effects");
    wrong
}

/// Most attempts of a builder at the same time.
fn most_at_once<'a>(attempts: impl Iterator<Item = &'a Attempt>) -> i64 {
    let mut times: Vec<(f64, i64)> = attempts.flat_map(|a| [(a.started, 1), (a.finished, -1)]).collect();
    times.sort_by(|a, b| a.partial_cmp(b).unwrap());
    let (mut now, mut most) = (0, 0);
    for (_, change) in times {
        now += change;
        most = most.max(now);
    }
    most
}

#[tokio::test]
async fn whatever_people_do_every_build_ends_once_and_for_a_reason() {
    let seed = number("BUILDREACTOR_TEST_SEED", 20_080_401);
    let operations = number("BUILDREACTOR_TEST_OPERATIONS", 1000);
    println!("BUILDREACTOR_TEST_SEED={seed} BUILDREACTOR_TEST_OPERATIONS={operations}");
    let began = Instant::now();
    let db = Db::new().await;
    let folder = temp_dir();
    let path = folder.path().display();
    // One line of below PIPE_BUF bytes, appended at once, for each side effect.
    let script = format!(
        "#!/bin/sh\n\
         echo \"S $BUILD_ID $BUILD_ATTEMPT\" >> {path}/trace\n\
         [ $PROP_SLEEP = 0 ] || sleep $PROP_SLEEP\n\
         code=0\n\
         case $PROP_END in\n\
         fail) code=1 ;;\n\
         flaky) [ -e {path}/$BUILD_ID ] || code=1 ;;\n\
         again) [ -e {path}/$BUILD_ID ] || code=75 ;;\n\
         esac\n\
         : > {path}/$BUILD_ID\n\
         echo \"E $BUILD_ID $BUILD_ATTEMPT\" >> {path}/trace\n\
         exit $code\n"
    );
    for (name, max_running, retry_failed) in BUILDERS {
        db.builder(name, &script).await;
        db.execute(&format!(
            "UPDATE builders SET max_running = {max_running}, retry_failed = {retry_failed}, max_attempts = {MAX_ATTEMPTS} WHERE name = '{name}'"
        ))
        .await;
    }
    let mut daemons = Vec::new();
    for name in ["w1", "w2", "w3"] {
        let env = [
            ("BUILDREACTOR_WORKER_SLOTS", "3"),
            ("BUILDREACTOR_REACTOR_POLL", "2s"),
            ("BUILDREACTOR_LEASE_PING", "500ms"),
            ("BUILDREACTOR_LEASE_LEASE", "2s"),
            ("BUILDREACTOR_LEASE_GRACE", "12s"),
        ];
        daemons.push(Daemon::start(&db, name, &env).await);
    }

    let model = Shared::default();
    let done = Arc::new(AtomicU64::new(0));
    let mut sessions = tokio::task::JoinSet::new();
    for n in 0..SESSIONS {
        let random = Random(seed.wrapping_mul(SESSIONS + 1).wrapping_add(n));
        let mut session = Session { client: db.session().await, random, model: Arc::clone(&model) };
        let done = Arc::clone(&done);
        sessions.spawn(async move {
            for _ in 0..operations / SESSIONS {
                session.operation().await;
                done.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(session.random.below(80))).await;
            }
        });
    }
    let mut random = Random(!seed);
    let mut killed_at = 0;
    let mut kills = 0;
    while !sessions.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        while let Some(ended) = sessions.try_join_next() {
            ended.unwrap();
        }
        if done.load(Ordering::Relaxed) >= killed_at + KILL_EVERY {
            killed_at = done.load(Ordering::Relaxed);
            let n = usize::try_from(random.below(daemons.len() as u64)).unwrap();
            look_at_log(&daemons[n], &model);
            daemons[n].kill();
            kills += 1;
            // At once, or late enough that the lease of its builds is over.
            tokio::time::sleep(Duration::from_millis(random.below(2) * random.below(4000))).await;
            start_again(&mut daemons[n]).await;
        }
    }
    let operated = began.elapsed();
    db.execute("SELECT resume_builder(name) FROM builders").await;
    let deadline = Instant::now() + Duration::from_secs(300);
    while db.one::<i64>("SELECT count(*) FROM build_queue").await > 0 {
        if Instant::now() >= deadline {
            let left: Vec<String> = db
                .all("SELECT to_jsonb(q)::text || ' ' || to_jsonb(b)::text FROM build_queue q JOIN builds b ON b.id = q.build_id")
                .await;
            panic!("seed {seed}: still in the queue: {left:#?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for daemon in &mut daemons {
        wait_for("the processes of builds to be gone", || async { processes_of(&daemon.state).is_empty() }).await;
        assert_eq!(daemon.stop().await, Some(0));
        look_at_log(daemon, &model);
    }

    let builds = read_builds(&db).await;
    let model = std::mem::take(&mut *model.lock().unwrap());
    let text = std::fs::read_to_string(folder.path().join("trace")).unwrap();
    let mut trace: HashMap<i64, Vec<(char, usize)>> = HashMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [what, id, attempt] = fields[..] else { panic!("{line}") };
        trace.entry(id.parse().unwrap()).or_default().push((what.chars().next().unwrap(), attempt.parse().unwrap()));
    }
    let mut problems = model.errors.clone();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (id, build) in &builds {
        *counts.entry(&build.state).or_default() += 1;
        let Some(asked) = model.builds.get(id) else {
            problems.push(format!("build {id} was inserted by nobody"));
            continue;
        };
        let traced = trace.get(id).map_or(&[][..], |lines| lines);
        for what in wrong(*id, &builds, &model, traced) {
            let attempts: Vec<String> =
                build.attempts.iter().map(|a| format!("{} {:.3}..{:.3}", a.state, a.started, a.finished)).collect();
            problems.push(format!(
                "build {id} ({}, {}, finished {:.3}): {what}\n  attempts {attempts:?}\n  trace {traced:?}\n  done {:#?}",
                asked.end, build.state, build.finished, asked.done
            ));
        }
    }
    for (name, max_running, _) in BUILDERS {
        let most = most_at_once(builds.values().filter(|b| b.builder == name).flat_map(|b| &b.attempts));
        if most > max_running {
            problems.push(format!("{name} ran {most} at once"));
        }
    }
    let odd = "SELECT (SELECT count(*) FROM running_builds) + (SELECT count(*) FROM builds WHERE NOT build_state_is_final(state))
        + (SELECT count(*) FROM build_attempts WHERE state = 'running')";
    if db.one::<i64>(odd).await > 0 || model.builds.len() != builds.len() {
        problems.push("something is left running, or was not recorded".to_owned());
    }
    // Deadlocks that a daemon got over count as well.
    let deadlocks: i64 = db.one("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").await;
    if deadlocks > 0 {
        problems.push(format!("{deadlocks} deadlocks"));
    }
    println!("{operated:.1?} of operations, {:.1?} in all, {kills} kills, builds: {counts:?}", began.elapsed());
    assert!(
        problems.is_empty(),
        "seed {seed}: {} problems:\n{}",
        problems.len(),
        problems.iter().map(|problem| format!("- {problem}\n")).collect::<String>()
    );
}

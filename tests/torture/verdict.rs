//! Whether the database and the trace tell the same story, and the one that was promised.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use super::faults::Torturer;
use super::{BUILDERS, MAX_ATTEMPTS, Sql, clock};

/// Between the clocks of the trace (10 ms steps, rounded down) and of the database.
const SLACK_US: i64 = 60_000;

struct Build {
    builder: String,
    state: String,
    attempt: i32,
    exit_code: Option<i32>,
    detail: String,
    kind: String,
    code: i32,
    /// Of the first attempt, and of later ones.
    beats: [usize; 2],
    needs: Vec<i64>,
    attempts: Vec<Attempt>,
    log: Option<String>,
}

struct Attempt {
    number: i32,
    worker: String,
    state: String,
    started: i64,
    finished: Option<i64>,
    exit_code: Option<i32>,
    term_signal: Option<i32>,
    detail: String,
}

/// A line of the trace. Their order is their order in time.
struct Line {
    what: String,
    build: i64,
    attempt: i32,
    /// When it was about to be written, on the database's clock.
    at: i64,
}

fn read_trace(path: &Path, offset: i64, problems: &mut Vec<String>) -> Vec<Line> {
    let mut lines = Vec::new();
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let parsed = (|| {
            let [what, build, attempt, at] = fields[..] else { return None };
            let (seconds, hundredths) = at.split_once('.')?;
            let us = seconds.parse::<i64>().ok()? * 1_000_000 + hundredths.parse::<i64>().ok()? * 10_000;
            let (build, attempt) = (build.parse().ok()?, attempt.parse().ok()?);
            Some(Line { what: what.to_owned(), build, attempt, at: us + offset })
        })();
        match parsed {
            Some(line) => lines.push(line),
            None => problems.push(format!("an odd line in the trace: {line}")),
        }
    }
    lines
}

async fn read_builds(sql: &mut Sql) -> BTreeMap<i64, Build> {
    let mut builds = BTreeMap::new();
    let rows = sql
        .query(
            "SELECT id, builder, state::text, attempt, exit_code, coalesce(detail, ''), properties->>'kind', (properties->>'code')::int,
                    ARRAY[(properties->>'beats')::int, (properties->>'again')::int], needs, CASE WHEN state IN ('passed', 'failed') THEN build_log_text(id) END
             FROM builds",
        )
        .await
        .unwrap();
    for row in rows {
        let build = Build {
            builder: row.get(1),
            state: row.get(2),
            attempt: row.get(3),
            exit_code: row.get(4),
            detail: row.get(5),
            kind: row.get(6),
            code: row.get(7),
            beats: row
                .get::<_, Vec<i32>>(8)
                .into_iter()
                .map(|n| usize::try_from(n).unwrap())
                .collect::<Vec<_>>()
                .try_into()
                .unwrap(),
            needs: row.get(9),
            attempts: Vec::new(),
            log: row.get(10),
        };
        builds.insert(row.get(0), build);
    }
    let rows = sql
        .query(
            "SELECT build_id, attempt, worker, state::text, (extract(epoch FROM started_at) * 1000000)::bigint,
                    (extract(epoch FROM finished_at) * 1000000)::bigint, exit_code, term_signal, coalesce(detail, '')
             FROM build_attempts ORDER BY 1, 2",
        )
        .await
        .unwrap();
    for row in rows {
        let attempt = Attempt {
            number: row.get(1),
            worker: row.get(2),
            state: row.get(3),
            started: row.get(4),
            finished: row.get(5),
            exit_code: row.get(6),
            term_signal: row.get(7),
            detail: row.get(8),
        };
        builds.get_mut(&row.get::<_, i64>(0)).unwrap().attempts.push(attempt);
    }
    builds
}

/// What is wrong with one build. `lines`: its part of the trace.
fn wrong(
    id: i64,
    builds: &BTreeMap<i64, Build>,
    lines: &[&Line],
    cancelled: &HashSet<i64>,
    torturer: &Torturer,
) -> Vec<String> {
    let build = &builds[&id];
    let beats = |attempt: i32| build.beats[usize::from(attempt > 1)];
    let mut wrong = Vec::new();
    let mut check = |right: bool, what: String| {
        if !right {
            wrong.push(what);
        }
    };
    let state = build.state.as_str();
    let finals = ["passed", "failed", "timed_out", "cancelled", "skipped"];
    check(finals.contains(&state), format!("its state is `{state}`"));
    check(state != "cancelled" || cancelled.contains(&id), "nobody cancelled it".to_owned());
    let timeout = build.builder == "slow";
    let verdict = if timeout {
        "timed_out"
    } else if build.code == 0 {
        "passed"
    } else {
        "failed"
    };
    if ["passed", "failed", "timed_out"].contains(&state) {
        check(state == verdict, format!("it should have {verdict}"));
        check(state == "timed_out" || build.exit_code == Some(build.code), format!("exit code {:?}", build.exit_code));
        let last = build.attempts.last();
        check(last.is_some_and(|last| last.state == state), "its last attempt says otherwise".to_owned());
        for need in &build.needs {
            check(builds[need].state == "passed", format!("it ran, and its need {need} is `{}`", builds[need].state));
        }
    }
    if state == "skipped" {
        let some = build.needs.iter().any(|need| builds[need].state != "passed");
        check(some && build.attempts.is_empty(), "it was skipped for nothing".to_owned());
    }

    // The attempts, one after the other.
    let numbers: Vec<i32> = build.attempts.iter().map(|attempt| attempt.number).collect();
    check(
        numbers == (1..=build.attempt).collect::<Vec<i32>>(),
        format!("attempts {numbers:?} and attempt {}", build.attempt),
    );
    let own: Vec<&str> = build.attempts.iter().map(|attempt| attempt.state.as_str()).collect();
    let verdicts = own.iter().filter(|state| ["passed", "failed", "timed_out"].contains(*state)).count();
    check(verdicts <= 1, format!("{verdicts} verdicts"));
    for attempt in &build.attempts {
        let number = attempt.number;
        let lines: Vec<&&Line> = lines.iter().filter(|line| line.attempt == number).collect();
        let count = |what: &str| lines.iter().filter(|line| line.what == what).count();
        check(
            count("start") <= 1 && count("finish") <= 1,
            format!("attempt {number} started or finished more than once"),
        );
        check(lines.is_empty() || lines[0].what == "start", format!("attempt {number} did not begin with its start"));
        if let Some(first) = lines.first() {
            let before = attempt.started - first.at;
            check(before < SLACK_US, format!("attempt {number} ran {before} us before it was to be seen"));
        }
        match (attempt.finished, lines.last()) {
            (None, _) => check(false, format!("attempt {number} has no end")),
            (Some(finished), Some(last)) => {
                let after = last.at - finished;
                check(after < SLACK_US, format!("attempt {number} ran {after} us after its end was recorded"));
            }
            (Some(_), None) => {}
        }
        match attempt.state.as_str() {
            "passed" | "failed" => {
                check(
                    count("start") == 1 && count("finish") == 1,
                    format!("attempt {number} {} and has not run to its end", attempt.state),
                );
                check(
                    count("beat") == beats(number),
                    format!("attempt {number}: {} beats of {}", count("beat"), beats(number)),
                );
                check(
                    attempt.exit_code == Some(build.code) && attempt.term_signal.is_none(),
                    format!("attempt {number}: exit code {:?}, signal {:?}", attempt.exit_code, attempt.term_signal),
                );
            }
            "timed_out" => check(timeout && count("finish") == 0, format!("attempt {number} timed out")),
            "lost" | "error" => {}
            // Given back.
            "cancelled" => {
                check(attempt.exit_code.is_none() || cancelled.contains(&id), format!("attempt {number} was cancelled"))
            }
            other => check(false, format!("attempt {number} is `{other}`")),
        }
    }
    let ascending = lines.windows(2).all(|two| two[0].attempt <= two[1].attempt);
    check(ascending, "TWO RUNS OVERLAP".to_owned());
    let known = lines.iter().all(|line| numbers.contains(&line.attempt));
    check(known, "an attempt ran that nobody recorded".to_owned());

    if let Some(log) = &build.log {
        let mut whole: String = (1..=beats(build.attempt)).map(|n| format!("line {n}\n")).collect();
        whole.push_str("last\n");
        // Its end alone may be missing, where a person was told that the file on the worker has it.
        let told = *log != whole
            && whole.starts_with(log.as_str())
            && told_of_log(&format!("{id}.{}", build.attempt), torturer);
        check(*log == whole || told, format!("its log is not whole: {log:?}"));
    }
    wrong
}

fn told_of_log(attempt: &str, torturer: &Torturer) -> bool {
    let text = format!("cannot write the log of build {attempt} to the database");
    torturer.workers.iter().any(|worker| std::fs::read_to_string(&worker.log).unwrap_or_default().contains(&text))
}

/// Most attempts of each builder that were alive at the same time, from the first line of each to its last.
fn most_at_once(lines: &[Line], builds: &BTreeMap<i64, Build>) -> BTreeMap<String, (i64, i64)> {
    let mut last = HashMap::new();
    for (n, line) in lines.iter().enumerate() {
        last.insert((line.build, line.attempt), n);
    }
    let (mut alive, mut now) = (HashSet::new(), BTreeMap::<String, i64>::new());
    let mut most = BTreeMap::<String, (i64, i64)>::new();
    for (n, line) in lines.iter().enumerate() {
        let (key, Some(build)) = ((line.build, line.attempt), builds.get(&line.build)) else { continue };
        let count = now.entry(build.builder.clone()).or_default();
        if alive.insert(key) {
            *count += 1;
            let known = most.entry(build.builder.clone()).or_default();
            if *count > known.0 {
                *known = (*count, line.at);
            }
        }
        if last[&key] == n {
            *count -= 1;
        }
    }
    most
}

/// Everything about a build that may explain it.
fn story(id: i64, build: &Build, lines: &[&Line], torturer: &Torturer) -> String {
    let mut text = format!(
        "  {} {} code {} beats {:?} needs {:?}; {} attempt {} {}\n",
        build.builder, build.kind, build.code, build.beats, build.needs, build.state, build.attempt, build.detail
    );
    for a in &build.attempts {
        let finished = a.finished.map_or("-".to_owned(), clock);
        writeln!(
            text,
            "  attempt {} on {}: {} {}..{finished} {}",
            a.number,
            a.worker,
            a.state,
            clock(a.started),
            a.detail
        )
        .unwrap();
    }
    // What goes on between start and finish as one line.
    let kind = |line: &Line| (line.attempt, ["start", "finish"].iter().position(|what| line.what == *what));
    for same in lines.chunk_by(|a, b| kind(a) == kind(b)) {
        let (first, last, n) = (same[0], same[same.len() - 1], same.len());
        let (from, to) = (clock(first.at), clock(last.at));
        writeln!(text, "  trace {id}.{}: {} x{n} {from}..{to}", first.attempt, first.what).unwrap();
    }
    for worker in &torturer.workers {
        let log = std::fs::read_to_string(&worker.log).unwrap_or_default();
        let names_it = |line: &&str| {
            [
                format!("build {id} "),
                format!("build {id}."),
                format!("build.id={id} "),
                format!("attempt {id}."),
                format!("build {id}:"),
            ]
            .iter()
            .any(|name| line.contains(name))
        };
        for line in log.lines().filter(names_it) {
            writeln!(text, "  {}: {line}", worker.name).unwrap();
        }
    }
    let from = build.attempts.first().map_or(i64::MAX, |attempt| attempt.started) - 3_000_000;
    let to = build.attempts.iter().filter_map(|attempt| attempt.finished).max().unwrap_or(i64::MAX);
    for (at, what) in torturer.timeline.0.iter().filter(|(at, _)| (from..=to).contains(at)) {
        writeln!(text, "  fault {} {what}", clock(*at)).unwrap();
    }
    text
}

/// Adds what is wrong to `problems`; comes back with a line of figures. `offset`: from the clock of the trace to the database's.
pub async fn check(
    sql: &mut Sql,
    trace: &Path,
    offset: i64,
    cancelled: &[i64],
    torturer: &Torturer,
    problems: &mut Vec<String>,
) -> String {
    let builds = read_builds(sql).await;
    let lines = read_trace(trace, offset, problems);
    let cancelled: HashSet<i64> = cancelled.iter().copied().collect();
    let mut by_build: HashMap<i64, Vec<&Line>> = HashMap::new();
    for line in &lines {
        by_build.entry(line.build).or_default().push(line);
    }
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    let mut attempts: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut worst, mut cut) = (0, 0);
    for (id, build) in &builds {
        *states.entry(&build.state).or_default() += 1;
        for attempt in &build.attempts {
            *attempts.entry(&attempt.state).or_default() += 1;
        }
        worst = worst.max(build.attempts.len());
        cut += usize::from(build.log.as_ref().is_some_and(|log| !log.ends_with("last\n")));
        let own = by_build.get(id).map_or(&[][..], |own| own);
        let found = wrong(*id, &builds, own, &cancelled, torturer);
        if !found.is_empty() {
            problems.push(format!("build {id}: {}\n{}", found.join("; "), story(*id, build, own, torturer)));
        }
    }
    for id in by_build.keys().filter(|id| !builds.contains_key(*id)) {
        problems.push(format!("build {id} ran, and nobody asked for it"));
    }
    for (builder, (most, at)) in most_at_once(&lines, &builds) {
        let limit = BUILDERS.iter().find(|known| known.0 == builder).unwrap().1;
        if most > limit {
            problems.push(format!("`{builder}` ran {most} builds at once at {}, of {limit}", clock(at)));
        }
    }
    let running =
        "SELECT (SELECT count(*) FROM running_builds) + (SELECT count(*) FROM build_attempts WHERE state = 'running')";
    if sql.query(running).await.unwrap()[0].get::<_, i64>(0) > 0 {
        problems.push("something is left running".to_owned());
    }
    if worst >= usize::try_from(MAX_ATTEMPTS).unwrap() {
        problems.push(format!("{worst} attempts of one build"));
    }
    for worker in &torturer.workers {
        let log = std::fs::read_to_string(&worker.log).unwrap_or_default();
        for line in log.lines() {
            if ["please report", "panicked", "deadlock", "does not understand", "do not understand"]
                .iter()
                .any(|word| line.contains(word))
            {
                problems.push(format!("{} said: {line}", worker.name));
            }
        }
    }
    format!(
        "builds {states:?}, attempts {attempts:?}, at most {worst} of one build, {cut} logs whose end is on the worker alone, {} lines",
        lines.len()
    )
}

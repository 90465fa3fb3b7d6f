//! The limits of the lease chain: those who would end a build in time are frozen, stopped or dead. What happens then, and what holds all
//! the same: one result, and a fencing token that tells the attempts apart.

use nix::sys::signal::Signal;

use crate::support::beating::{BEYOND_GRACE, Beating, Pair, SMALL, Stopped, attempts, signal, uptime};
use crate::support::freezer::Freezer;
use crate::support::{Daemon, Db, Launch, processes_of, wait_for, wait_for_within};

/// A worker whose processes all stand still for longer than grace, and go on.
async fn stands_still(freezer: Option<Freezer>) {
    let db = Db::new().await;
    let (deaf, obedient) = (Beating::new(), Beating::new());
    db.builder("deaf", &deaf.script()).await;
    db.builder("obedient", &obedient.obedient_script()).await;
    let settings = [SMALL.as_slice(), &[("BUILDREACTOR_WORKER_SLOTS", "2")]].concat();
    let before = freezer.as_ref().map(Freezer::before).unwrap_or_default();
    let mut first = Daemon::launch(Launch { before, ..Launch::default() }, &db.url(), "first", &settings);
    first.ready().await;
    let ids = [db.enqueue("deaf").await, db.enqueue("obedient").await];
    for build in [&deaf, &obedient] {
        build.beats_in(1).await;
    }
    let _second = Daemon::start(&db, "second", &settings).await;
    let (frozen, stopped) = match &freezer {
        Some(freezer) => (Some(freezer.freeze().await), None),
        None => (None, Some(Stopped::worker(&first))),
    };
    let still = uptime();
    for (id, build) in ids.into_iter().zip([&deaf, &obedient]) {
        build.beats_in(2).await;
        assert_eq!(db.finished(id).await, "failed");
        assert!(build.last_of(1) <= still);
        let ends = ["1|first|lost|worker `first` disappeared", "2|second|failed|3|exit code 3"];
        assert_eq!(attempts(&db, id).await, ends);
    }
    assert!(!processes_of(&first.state).is_empty());
    // Each write of a row has its transaction.
    let written = "SELECT xmin::text FROM builds UNION ALL SELECT xmin::text FROM build_attempts ORDER BY 1";
    let verdicts: Vec<String> = db.all(written).await;
    assert_eq!(verdicts.len(), 6);

    let since = uptime();
    drop((frozen, stopped));
    wait_for("the end of its trees", || async { processes_of(&first.state).is_empty() }).await;
    for (name, build) in [("deaf", &deaf), ("obedient", &obedient)] {
        let lived = build.last_of(1) - since;
        println!("the {name} one lived for {lived:.1} s more, with a lease of 3 s that had ended before");
        // 2 s between SIGTERM and SIGKILL; the rest of the 10 s for the killing is for a busy machine.
        assert!(lived < 10.0, "{lived:.1} s");
        // To a receiver that has had the second one's these are of a lower attempt.
        let beats = build.beats();
        let second = beats.iter().position(|(attempt, _)| *attempt == 2).unwrap();
        assert!(beats[second + 1..].iter().all(|(attempt, _)| *attempt == 1));
    }
    wait_for_within(BEYOND_GRACE, "its daemon's word on both", || async { first.times_said("no longer ours") == 2 })
        .await;
    // It works again.
    db.execute("INSERT INTO builders (name, script, labels) VALUES ('own', 'true', '{own}')").await;
    assert_eq!(first.stop().await, Some(0));
    first.set("BUILDREACTOR_WORKER_LABELS", "own");
    first.spawn_again();
    first.ready().await;
    let own = db.enqueue("own").await;
    assert_eq!(db.finished(own).await, "passed");
    let others = written.replace("builds", &format!("builds WHERE id <> {own}"));
    let others = others.replace("build_attempts", &format!("build_attempts WHERE build_id <> {own}"));
    assert_eq!(db.all::<String>(&others).await, verdicts, "nothing was written a second time");
}

#[tokio::test]
async fn a_machine_frozen_for_longer_than_grace_ends_its_trees_when_it_is_thawed_and_records_nothing() {
    match Freezer::of_either_version() {
        Ok(freezer) => stands_still(Some(freezer)).await,
        Err(why) => println!("NOT TESTED, this machine gives us no freezer: {why}"),
    }
}

#[tokio::test]
async fn a_worker_stopped_with_all_its_trees_for_longer_than_grace_ends_them_when_it_goes_on_and_records_nothing() {
    stands_still(None).await;
}

/// Who could have killed the tree is dead, or stopped.
async fn nobody_is_left(namespace: &str, last: Signal) {
    let db = Db::new().await;
    let mut pair = Pair::start(&db, namespace).await;
    let stopped = Stopped::these(pair.first.guardians());
    let guardian = pair.first.guardians()[0];
    pair.first.kill();
    signal(pair.first.keeper().unwrap(), Signal::SIGKILL);
    wait_for("its keeper's end", || async { pair.first.keeper().is_none() }).await;
    let since = uptime();
    // A supervisor starts the next daemon, which does not begin beside the tree: neither before others have the build nor after.
    let refused = async |first: &mut Daemon| {
        first.spawn_again();
        first.says("processes of earlier builds do not die").await;
        assert_eq!(first.exited().await, Some(75));
    };
    refused(&mut pair.first).await;
    pair.build.beats_in(2).await;
    assert_eq!(db.finished(pair.id).await, "failed");
    let ends = ["1|first|lost|worker `first` disappeared", "2|second|failed|3|exit code 3"];
    assert_eq!(attempts(&db, pair.id).await, ends);
    pair.build.beats_at(uptime()).await;
    let lived = pair.build.last_of(1) - since;
    assert!(lived > 13.0, "this is the limit of what we can promise: {lived:.1} s");
    refused(&mut pair.first).await;
    assert!(!processes_of(&pair.first.state).is_empty());

    signal(guardian, last);
    wait_for("the end of its tree", || async { processes_of(&pair.first.state).is_empty() }).await;
    drop(stopped);
    pair.first.spawn_again();
    pair.first.ready().await;
    let own = db.enqueue("own").await;
    assert_eq!(db.finished(own).await, "passed");
    assert_eq!(attempts(&db, pair.id).await, ends);
}

#[tokio::test]
async fn a_stopped_guardian_whose_keeper_and_daemon_are_dead_keeps_the_folder_closed_and_ends_its_tree_when_it_goes_on()
{
    for namespace in ["true", "false"] {
        nobody_is_left(namespace, Signal::SIGCONT).await;
    }
}

#[tokio::test]
async fn a_stopped_guardian_whose_keeper_and_daemon_are_dead_takes_its_namespace_with_it_when_it_is_killed() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &SMALL).await;
    if db.one::<String>("SELECT detail FROM workers").await == "process trees: PID namespace" {
        drop(daemon);
        nobody_is_left("true", Signal::SIGKILL).await;
    } else {
        println!("NOT TESTED, there are no PID namespaces here");
    }
}

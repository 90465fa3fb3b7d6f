//! Tests: what each key refuses, and in which words.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use super::tests::{accepts, on_host, read, refuses, refuses_variable, without_file};

#[test]
fn unknown_names_are_refused_with_the_nearest_known_one() {
    let not_yet = |name| format!("FILE:1: section `{name}` is not supported by this version, remove it");
    refuses("http.x = 1\nhttp.y = 2", &[&not_yet("http")]);
    refuses(
        "[[worker]]\n[xyz]\n",
        &[
            "FILE:1: worker: an array is given, it must be a section, for example `[worker]`",
            "FILE:2: unknown section `xyz`, known are `database`, `worker`, `reactor`, `lease`, `log`, `retention`, `kick`, `mail`, `buildbot.NAME`",
        ],
    );
    refuses(
        "slots = 1\nfoo = 2\n\"a\\nb\" = 3\n",
        &[
            "FILE:1: unknown key `slots` outside of any section, move it below a line `[worker]`",
            "FILE:2: unknown key `foo` outside of any section",
            "FILE:3: unknown key `a?b` outside of any section",
        ],
    );
    refuses(
        "[log]\nkeeep = 1\nfoo = 2\nslots = 3\n",
        &[
            "FILE:2: log.keeep: unknown key, did you mean `keep`?",
            "FILE:3: log.foo: unknown key, known are `database_limit`, `file_limit`, `keep`",
            "FILE:4: log.slots: unknown key, did you mean the one in `[worker]`?",
        ],
    );
}

#[test]
fn unknown_variables_are_refused_except_those_of_others() {
    let others = [
        ("BUILDREACTOR_PG_BIN", "x"),
        ("BUILDREACTOR_LOG", "x"),
        ("BUILDREACTOR_CONFIG", "x"),
        ("BUILDREACTOR_TEST_ANYTHING", "x"),
        ("buildreactor_worker_slots", "x"),
    ];
    assert_eq!(without_file(&others, "host").unwrap(), on_host("host"));
    refuses_variable(
        "BUILDREACTOR_HTTP_LISTEN",
        "x",
        "BUILDREACTOR_HTTP_LISTEN: section `http` is not supported by this version, remove it",
    );
    refuses_variable(
        "BUILDREACTOR_SLOTS",
        "4",
        "BUILDREACTOR_SLOTS: unknown variable, after `BUILDREACTOR_` come a section and a key, for \
         example `BUILDREACTOR_WORKER_SLOTS=2`",
    );
}

#[test]
fn wrong_types_are_refused() {
    let text = "it must be a connection string (left out: the `PG*` variables), for example \
                `url = \"postgresql:///builds\"`";
    for (value, given) in [
        ("true", "a boolean"),
        ("[1]", "an array"),
        ("2.5", "a float"),
        ("1979-05-27", "a datetime"),
        ("{}", "a table"),
    ] {
        let expected = format!("FILE:2: database.url: {given} is given, {text}");
        refuses(&format!("[database]\nurl = {value}"), &[&expected]);
    }
    refuses(
        "[worker]\nslots = \"2\"\nlabels = \"linux\"\nmin_free_disk = true\n",
        &[
            "FILE:2: worker.slots: a string is given, it must be a whole number from 1 to 1000, for \
             example `slots = 2`",
            "FILE:3: worker.labels: a string is given, it must be a list of labels, neither empty \
             nor with a comma in them, for example `labels = [\"linux\", \"big\"]`",
            "FILE:4: worker.min_free_disk: a boolean is given, it must be a whole number and a unit \
             such as `kB`, `MiB` or `GiB`, or 0, for example `min_free_disk = \"1 GiB\"`",
        ],
    );
    refuses_variable(
        "BUILDREACTOR_WORKER_SLOTS",
        "four",
        "BUILDREACTOR_WORKER_SLOTS: `four` is not a whole number, it must be a whole number from 1 \
         to 1000, for example `BUILDREACTOR_WORKER_SLOTS=2`",
    );
    refuses_variable(
        "BUILDREACTOR_WORKER_LABELS",
        "a,,b",
        "BUILDREACTOR_WORKER_LABELS: in an entry, it is empty, it must be a list of labels, neither \
         empty nor with a comma in them, for example `BUILDREACTOR_WORKER_LABELS=linux, big`",
    );
}

/// What is said of one value of one key, without place, key and cure.
fn said(section: &str, key: &str, value: &str) -> String {
    let file = format!("[{section}]\n{key} = {value}\n");
    let errors = read(file.as_bytes(), &[]).unwrap_err();
    let rest = errors[0].strip_prefix(&format!("FILE:2: {section}.{key}: ")).unwrap();
    assert_eq!(errors.len(), 1, "{errors:?}");
    rest.split(", it must be ").next().unwrap().to_owned()
}

#[test]
fn durations_need_a_known_unit_and_a_fixed_length() {
    let poll = |value| said("reactor", "poll", value);
    for bare in ["30", "1.5", "\"30\"", "\" 0 \""] {
        assert!(poll(bare).ends_with("` has no unit"), "{bare}");
    }
    for out in ["\"0s\"", "\"-5s\"", "\"5s ago\"", "\"99ms\"", "\"25h\""] {
        assert_eq!(poll(out), format!("{} is out of range", out.replace('"', "`")));
    }
    assert_eq!(poll("\"3 parsecs\""), "`3 parsecs` is not a duration");
    assert_eq!(poll("\"soon\""), "`soon` is not a duration");
    assert_eq!(said("log", "keep", "\"1 month\""), "`1 month` has no fixed length");
    assert_eq!(said("log", "keep", "\"\""), "it is empty");
    assert_eq!(accepts("reactor.poll = \"1 day\"").reactor.poll, super::value::DAY);
}

#[test]
fn retention_keeps_everything_unless_it_is_told_otherwise() {
    assert_eq!(accepts("[retention]").retention, super::Retention::default());
    let kept = accepts("[retention]\nbuilds = \"90 days\"\nbuilds_per_builder = 500\nlogs = \"2 weeks\"").retention;
    let days = |days| Some(days * super::value::DAY);
    assert_eq!((kept.builds, kept.builds_per_builder, kept.logs), (days(90), Some(500), days(14)));
    refuses(
        "[retention]\nbuilds = 90\nbuilds_per_builder = 0\nlogs = \"999ms\"\nlog = \"1 day\"\n",
        &[
            "FILE:2: retention.builds: `90` has no unit, it must be a duration with a unit, from 1 s to 36500 days \
             (left out: for ever), for example `builds = \"90 days\"`",
            "FILE:3: retention.builds_per_builder: `0` is out of range, it must be a whole number from 1 to 1000000 \
             (left out: no limit), for example `builds_per_builder = 1000`",
            "FILE:4: retention.logs: `999ms` is out of range, it must be a duration with a unit, from 1 s to 36500 \
             days (left out: as long as their builds), for example `logs = \"30 days\"`",
            "FILE:5: retention.log: unknown key, did you mean `logs`?",
        ],
    );
    assert_eq!(said("retention", "builds", "\"3 months\""), "`3 months` has no fixed length");
    assert_eq!(said("retention", "builds", "\"36501 days\""), "`36501 days` is out of range");
    assert_eq!(said("retention", "builds_per_builder", "1000001"), "`1000001` is out of range");
}

#[test]
fn sizes_need_a_known_unit() {
    let limit = |value| said("log", "file_limit", value);
    for bare in ["1048576", "-1", "\"65536\""] {
        assert_eq!(limit(bare), format!("`{}` has no unit", bare.replace('"', "")));
    }
    for no in ["\"1.5 GiB\"", "\"1 gib\"", "\"1 EiB\"", "\"-1 MiB\"", "\"MiB\""] {
        assert_eq!(limit(no), format!("{} is not a size", no.replace('"', "`")));
    }
    for out in ["\"63 KiB\"", "0", "\"0\"", "\"9999999999 TiB\""] {
        let shown = out.replace('"', "");
        assert_eq!(limit(out), format!("`{shown}` is out of range"));
    }
    assert_eq!(said("log", "database_limit", "\"16383 B\""), "`16383 B` is out of range");
    let config = accepts("log.database_limit = \"16384 B\"\nlog.file_limit = \"64 KiB\"");
    assert_eq!((config.log.database_limit, config.log.file_limit), (16_384, 65_536));
}

#[test]
fn values_out_of_their_bounds_are_refused() {
    let worker = |key, value| said("worker", key, value);
    for count in ["0", "1001", "-1", "0xFFFFFFFFFF", "99999999999999999999999999999999999999999"] {
        assert_eq!(worker("slots", count), format!("`{count}` is out of range"));
    }
    for name in ["...", "a b", "é", &"x".repeat(64)] {
        let shown: String = name.chars().take(60).collect();
        let dots = if name.len() > 60 { "..." } else { "" };
        let expected = format!("`{shown}{dots}` is no such name");
        assert_eq!(said("worker", "name", &format!("\"{name}\"")), expected);
    }
    assert_eq!(worker("name", "\"\""), "it is empty");
    assert_eq!(worker("name", "\"a\\u0000\""), "it holds a control character");
    assert_eq!(worker("labels", "[\"a\", \"\"]"), "in an entry, it is empty");
    assert_eq!(worker("labels", "[\"a,b\"]"), "`a,b` holds a comma");
    assert_eq!(worker("labels", "[1]"), "in an entry, an integer is given");
    assert_eq!(worker("builders", "[\"a[bc]\"]"), "`a[bc]` matches no builder's name");
    assert_eq!(worker("builders", "[]"), "the list is empty, so no build would ever run here");
    assert_eq!(worker("state_dir", "\"state\""), "`state` is not absolute");
}

#[test]
fn settings_must_fit_together() {
    refuses(
        "[lease]\nping = \"20s\"\n[log]\nfile_limit = \"64 KiB\"\n",
        &[
            "FILE:2: lease.lease: `40s` is less than three times `lease.ping` (`20s`), it must be at \
             least `1m`, for example `lease = \"1m\"`",
            "FILE:4: log.file_limit: `64 KiB` is less than `log.database_limit`, it must be at least \
             `1 MiB`, for example `file_limit = \"1 MiB\"`",
        ],
    );
    refuses_variable(
        "BUILDREACTOR_LEASE_LEASE",
        "51s",
        "BUILDREACTOR_LEASE_LEASE: lease.grace: `1m` is less than `lease.lease` (`51s`) and `10s` to \
         kill a tree, it must be at least `1m 1s`, for example `grace = \"1m 1s\"`",
    );
    accepts("[lease]\nping = \"13s\"\nlease = \"39s\"\ngrace = \"49s\"\n");
    // A refused value says nothing about how the others fit it.
    assert_eq!(said("lease", "ping", "\"2 days\""), "`2 days` is out of range");
}

#[test]
fn masters_have_sections_of_their_own() {
    let file = "[buildbot.main]\nurl = \"http://localhost:8010\"\n[buildbot.big-1]\nurl = \"https://b.example.org/bb/\"\nuser = \"u\"\npassword_file = \"/p\"\nca_file = \"/c\"\n";
    let masters = read(file.as_bytes(), &[("BUILDREACTOR_BUILDBOT_BIG_1_USER", "v")]).unwrap().buildbot;
    assert_eq!(masters.keys().collect::<Vec<_>>(), ["big-1", "main"]);
    assert_eq!((masters["main"].url.as_str(), &masters["main"].user), ("http://localhost:8010", &None));
    let expected = super::Buildbot {
        url: "https://b.example.org/bb/".to_owned(),
        user: Some("v".to_owned()),
        password_file: Some("/p".into()),
        ca_file: Some("/c".into()),
    };
    assert_eq!(masters["big-1"], expected);
    for key in super::buildbot::KEYS {
        let other = match key.name {
            "url" => "",
            "password_file" => "url = \"http://h\"\nuser = \"u\"\n",
            _ => "url = \"http://h\"\n",
        };
        accepts(&format!("[buildbot.m]\n{other}{} = {}\n", key.name, key.example));
    }
    refuses(
        "buildbot = 1",
        &["FILE:1: buildbot: an integer is given, it must be a section, for example `[buildbot.main]`"],
    );
    refuses(
        "[buildbot]\nurl = \"http://h\"\n[buildbot.\"a b\"]\n[buildbot.c]\nusr = 1\nuser = 2\n[buildbot.d]\nurl = \"http://u:secret@h\"\n[buildbot.e]\nurl = \"h:8010\"",
        &[
            "FILE:2: buildbot.url: a string is given, put it into a section that names the master, for example `[buildbot.main]`",
            "FILE:3: buildbot.a b: a master's name must be 1 to 63 characters of `A-Z a-z 0-9 . _ -`",
            "FILE:4: buildbot.c: it has no `url`, for example `url = \"http://localhost:8010\"`",
            "FILE:5: buildbot.c.usr: unknown key, did you mean `user`?",
            "FILE:6: buildbot.c.user: an integer is given, it must be a user name, for example `user = \"buildreactor\"`",
            "FILE:8: buildbot.d.url: user and password are keys of their own, it must be an address that begins with \
             `https://` or `http://`, for example `url = \"http://localhost:8010\"`",
            "FILE:10: buildbot.e.url: `h:8010` is no such address, it must be an address that begins with \
             `https://` or `http://`, for example `url = \"http://localhost:8010\"`",
        ],
    );
    let nobodys = "[buildbot.main]\nurl = \"http://h\"\npassword_file = \"/p\"\n[mail]\npassword_file = \"/p\"";
    refuses(
        nobodys,
        &[
            "FILE:5: mail.password_file: whose password is it? Add `user`",
            "buildbot.main.password_file: whose password is it? Add `user` to [buildbot.main]",
        ],
    );
    refuses_variable(
        "BUILDREACTOR_BUILDBOT_MAIN_URL",
        "http://h",
        "BUILDREACTOR_BUILDBOT_MAIN_URL: the file has no section [buildbot.main] that it could override",
    );
}

#[test]
fn the_kick_port_is_an_address_of_this_machine() {
    let listen = |value| said("kick", "listen", value);
    assert_eq!(accepts("[kick]\nlisten = \"[::1]:7999\"").kick.listen.unwrap().port(), 7999);
    for value in ["\"7999\"", "\"localhost:7999\"", "\"127.0.0.1:0\""] {
        assert_eq!(listen(value), format!("{} is no such address", value.replace('"', "`")));
    }
}

//! What a script is given: its first line, the variables of its login, of its builder and of its properties, and words in the log about
//! what could not be given as it was asked for.

use crate::support::{Daemon, Db};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

async fn run(db: &Db, script: &str) -> String {
    let name = format!("b{}", crate::support::unique());
    db.builder(&name, script).await;
    let id = db.enqueue(&name).await;
    let state = db.finished(id).await;
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert_eq!(state, "passed", "{script:?}: {log}");
    log
}

#[tokio::test]
async fn a_first_line_counts_behind_blank_lines_and_a_byte_order_mark() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let perl = "#!/usr/bin/env perl\nprint \"perl\\n\";";
    for before in ["", "\n", "\n\n\n", "\u{feff}", "\u{feff}\n", "\r\n\r\n", "\n\u{feff}", " \t\r\n", "\n    "] {
        assert_eq!(run(&db, &format!("{before}{perl}")).await, "perl\n", "{before:?}");
    }
    // As people write it.
    db.execute(
        "INSERT INTO builders (name, script) VALUES ('quoted', $sql$\n#!/usr/bin/env perl\nprint \"perl\\n\";\n$sql$)",
    )
    .await;
    let id = db.enqueue("quoted").await;
    assert_eq!(db.finished(id).await, "passed");
    for (script, told) in [("\u{feff}echo shell", "shell\n"), ("\n\n  echo shell\n#!/no/such", "shell\n")] {
        assert_eq!(run(&db, script).await, told, "{script:?}");
    }
}

#[tokio::test]
async fn the_variables_of_a_login_are_there_even_if_the_daemon_has_none() {
    let db = Db::new().await;
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap();
    let shell = if user.shell.as_os_str().is_empty() { "/bin/sh".into() } else { user.shell.display().to_string() };
    let from_database = format!("{}|{}|{}|{shell}\n", user.dir.display(), user.name, user.name);
    let show = "echo \"$(printenv HOME)|$(printenv USER)|$(printenv LOGNAME)|$(printenv SHELL)\"";
    for (change, told) in [
        ("unset HOME USER LOGNAME SHELL", from_database.clone()),
        ("export HOME= USER= LOGNAME= SHELL=", from_database),
        ("unset USER LOGNAME SHELL; export HOME=/usr", format!("/usr|{}|{}|{shell}\n", user.name, user.name)),
    ] {
        let before = ["sh", "-c", &format!("{change}; exec \"$@\""), "sh"].map(str::to_owned).to_vec();
        let launch = crate::support::Launch { before, ..Default::default() };
        let mut daemon = Daemon::launch(launch, &db.url(), "w", &[HOUR]);
        daemon.ready().await;
        assert_eq!(run(&db, show).await, told, "{change}");
        run(&db, "cd ~ && cd; git config --global --get no.such || [ $? = 1 ]").await;
        // The builder's own come first.
        db.builder("own", show).await;
        db.execute(r#"UPDATE builders SET env = '{"HOME": "/opt", "LOGNAME": "ann", "USER": "", "SHELL": "/bin/x"}' WHERE name = 'own'"#)
            .await;
        let id = db.enqueue("own").await;
        assert_eq!(db.finished(id).await, "passed");
        assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, "/opt||ann|/bin/x\n");
        db.execute("DELETE FROM builds; DELETE FROM builders").await;
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn properties_that_cannot_each_have_a_variable_are_told_in_the_log() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "env | grep ^PROP_ | cut -c1-40 | sort").await;
    for (properties, told) in [
        (
            r#"{"a.b": "dot", "a-b": "minus", "A_B": "plain", "other": "x"}"#,
            "[buildreactor: the properties `A_B`, `a-b`, `a.b` are all PROP_A_B, which has the value of `A_B`; BUILD_FILE has all]\nPROP_A_B=plain\nPROP_OTHER=x\n",
        ),
        (
            r#"{"Größe": 1, "Gr  e": 2, "x y": 3, "x\ty": 4}"#,
            "[buildreactor: the properties `Gr  e`, `Größe` are all PROP_GR__E, which has the value of `Gr  e`; BUILD_FILE has all]\n[buildreactor: the properties `x y`, `x y` are all PROP_X_Y, which has the value of `x y`; BUILD_FILE has all]\nPROP_GR__E=2\nPROP_X_Y=4\n",
        ),
        (
            r#"{"": "nameless", "日": 1}"#,
            "[buildreactor: the property `` has no letter or digit for a name of a variable; it is PROP_]\n[buildreactor: the property `日` has no letter or digit for a name of a variable; it is PROP__]\nPROP_=nameless\nPROP__=1\n",
        ),
        (
            r#"{"a": 1, "b.c": 2, "_": 3}"#,
            "[buildreactor: the property `_` has no letter or digit for a name of a variable; it is PROP__]\nPROP_A=1\nPROP_B_C=2\nPROP__=3\n",
        ),
        (r#"{"a": 1, "b.c": 2}"#, "PROP_A=1\nPROP_B_C=2\n"),
    ] {
        db.execute(&format!("INSERT INTO build_queue (builder, properties) VALUES ('b', '{properties}')")).await;
        let id: i64 = db.one("SELECT max(id) FROM builds").await;
        assert_eq!(db.finished(id).await, "passed");
        assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, told, "{properties}");
    }
}

#[tokio::test]
async fn properties_past_the_limits_of_an_environment_are_told_in_the_log() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "echo $(env | grep -c ^PROP_) $(wc -c < \"$BUILD_FILE\")").await;
    for (properties, variables, told) in [
        // Nine of 60,000 bytes: eight fit into 512 KiB.
        (
            "SELECT jsonb_object_agg('p' || n, repeat('x', 60000)) FROM generate_series(1, 9) n",
            8,
            "alone: `p9` (60000 bytes)]",
        ),
        (
            "SELECT jsonb_build_object('just', repeat('x', 65536), 'over', repeat('x', 65537))",
            1,
            "alone: `over` (65537 bytes)]",
        ),
        // Small ones take room too: the kernel counts a pointer for each.
        ("SELECT jsonb_object_agg('p' || n, 1) FROM generate_series(1, 9999) n", 9999, ""),
    ] {
        db.execute(&format!("INSERT INTO build_queue (builder, properties) VALUES ('b', ({properties}))")).await;
        let id: i64 = db.one("SELECT max(id) FROM builds").await;
        assert_eq!(db.finished(id).await, "passed");
        let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
        assert!(log.contains(&format!("\n{variables} ")) || log.starts_with(&format!("{variables} ")), "{log}");
        assert!(if told.is_empty() { !log.contains("buildreactor") } else { log.contains(told) }, "{log}");
    }
}

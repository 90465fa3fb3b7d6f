//! Who is asked, and who goes before whom.

use super::*;

#[test]
fn text_goes_before_service_before_variables_before_defaults() {
    let home = Home::new().with(&[
        ("PGSERVICE", "farm"),
        ("PGHOST", "of-variable"),
        ("PGUSER", "of-variable"),
        ("PGDATABASE", "of-variable"),
        ("PGAPPNAME", "of-variable"),
    ]);
    home.file(".pg_service.conf", 0o644, "[farm]\nhost=of-service\nuser=of-service\nuser=twice\ndbname=of-service\n");
    let config = home.ok("host=of-text").config();
    assert_eq!(config.get_hosts(), [tcp("of-text")]);
    assert_eq!(config.get_user(), Some("of-service"));
    assert_eq!(config.get_dbname(), Some("of-service"));
    assert_eq!(config.get_application_name(), Some("of-variable"));
    assert_eq!(config.get_ports(), [5432]);
}

#[test]
fn an_empty_value_hides_lower_sources_and_means_the_default() {
    let home = Home::new().with(&[("PGPORT", "5433"), ("PGDATABASE", "x"), ("PGSSLMODE", "")]);
    let config = home.ok("user=alice port='' dbname=''").config();
    assert_eq!(config.get_ports(), [5432]);
    assert_eq!(config.get_dbname(), Some("alice"));
}

#[test]
fn every_variable_is_honoured() {
    let home = Home::new().with(&[
        ("PGHOST", "db.example"),
        ("PGHOSTADDR", "192.0.2.7"),
        ("PGPORT", "5433"),
        ("PGDATABASE", "builds"),
        ("PGUSER", "alice"),
        ("PGPASSWORD", "secret"),
        ("PGOPTIONS", "-c search_path=farm"),
        ("PGAPPNAME", "me"),
        ("PGSSLMODE", "require"),
        ("PGSSLNEGOTIATION", "direct"),
        ("PGSSLROOTCERT", "/r"),
        ("PGSSLCERT", "/c"),
        ("PGSSLKEY", "/k"),
        ("PGCONNECT_TIMEOUT", "7"),
        ("PGTARGETSESSIONATTRS", "read-write"),
        ("PGCHANNELBINDING", "require"),
        ("PGLOADBALANCEHOSTS", "random"),
        ("PGREQUIRESSL", "1"),
        ("PGCLIENTENCODING", "LATIN1"),
    ]);
    let info = home.ok("");
    let config = info.config();
    assert_eq!(config.get_hosts(), [tcp("db.example")]);
    assert_eq!(config.get_hostaddrs(), ["192.0.2.7".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(config.get_ports(), [5433]);
    assert_eq!(config.get_dbname(), Some("builds"));
    assert_eq!(config.get_user(), Some("alice"));
    assert_eq!(password(&info).as_deref(), Some("secret"));
    assert_eq!(config.get_options(), Some("-c search_path=farm"));
    assert_eq!(config.get_application_name(), Some("me"));
    assert_eq!(config.get_ssl_mode(), WireMode::Require);
    assert_eq!(config.get_ssl_negotiation(), SslNegotiation::Direct);
    assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(7)));
    assert_eq!(config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
    assert_eq!(config.get_channel_binding(), ChannelBinding::Require);
    assert_eq!(config.get_load_balance_hosts(), LoadBalanceHosts::Random);
    let file = |file: &Option<tls::NamedFile>| file.as_ref().unwrap().path.clone();
    assert_eq!(file(&info.tls.cert), Path::new("/c"));
    assert_eq!(file(&info.tls.key), Path::new("/k"));
    let tls::RootCertificate::File(root) = &info.tls.root else { panic!("{:?}", info.tls.root) };
    assert_eq!(file(root), Path::new("/r"));
    assert_eq!(root.as_ref().unwrap().origin, Origin::Variable("PGSSLROOTCERT"));
}

#[test]
fn requiressl_is_ignored() {
    let home = Home::new().with(&[("PGREQUIRESSL", "1")]);
    let config = home.ok("host=h").config();
    assert_eq!(config.get_ssl_mode(), WireMode::Prefer);
}

#[test]
fn the_password_file_is_used_where_no_password_is_given() {
    let home = Home::new();
    home.file(".pgpass", 0o600, "h:*:*:*:of-file\nlocalhost:54329:*:*:of-socket\n");
    assert_eq!(password(&home.ok("host=h")).as_deref(), Some("of-file"));
    assert_eq!(password(&home.ok("host=h password=mine")).as_deref(), Some("mine"));
    assert_eq!(password(&home.ok("host=h password=''")).as_deref(), Some("of-file"));
    assert_eq!(password(&home.ok("host=other")), None);
    let port = "port=54329";
    let of = |text: &str| password(&home.ok(&format!("{text} {port}")));
    assert_eq!(of("host=localhost").as_deref(), Some("of-socket"));
    // `localhost` also stands for the default socket directory, and only for that.
    assert_eq!(of("").as_deref(), Some("of-socket"));
    let default = home.ok(port).psql_env()[0].1.clone();
    let named = of(&format!("host={default}"));
    assert_eq!(named.as_deref(), Some("of-socket"));
    assert_eq!(of("host=/somewhere"), None);
    assert_eq!(password(&home.ok("host=localhost")), None);

    let other = home.file("other", 0o600, "*:*:*:*:of-other\n");
    let text = format!("host=h passfile={other}");
    assert_eq!(password(&home.ok(&text)).as_deref(), Some("of-other"));
    let home = home.with(&[("PGPASSFILE", &other)]);
    assert_eq!(password(&home.ok("host=h")).as_deref(), Some("of-other"));
}

#[test]
fn a_password_file_that_others_may_read_is_left_out() {
    let home = Home::new();
    for (mode, expected) in [(0o640, None), (0o604, None), (0o400, Some("x"))] {
        home.file(".pgpass", 0o600, "*:*:*:*:x\n");
        home.file(".pgpass", mode, "*:*:*:*:x\n");
        assert_eq!(password(&home.ok("host=h")).as_deref(), expected, "{mode:o}");
    }
    assert_eq!(password(&home.ok("host=h passfile=/dev/null")), None);
}

#[test]
fn one_host_is_never_shown_another_hosts_password() {
    let home = Home::new();
    home.file(".pgpass", 0o600, "h1:*:*:*:hunter1\nh2:*:*:*:hunter2\nh3:*:*:*:hunter1\n");
    let said = home.error("host=h1,h2");
    assert!(said.contains("same password for all hosts"), "{said}");
    assert!(!said.contains("hunter"), "{said}");
    assert!(home.error("host=h1,h4").contains("same password"));
    assert_eq!(password(&home.ok("host=h1,h3")).as_deref(), Some("hunter1"));
}

#[test]
fn services_are_looked_for_in_the_named_then_personal_then_system_file() {
    let home = Home::new();
    home.file("pg_service.conf", 0o644, "[both]\nhost=system\n[system]\nhost=system\n");
    home.file(".pg_service.conf", 0o644, "[both]\nhost=personal\n");
    let named = home.file("named", 0o644, "[named]\nhost=named\nport=x\n");
    let host = |text: &str| home.ok(text).config().get_hosts().to_vec();
    assert_eq!(host("service=both"), [tcp("personal")]);
    assert_eq!(host("postgresql:///?service=system"), [tcp("system")]);

    let said = home.error(&format!("service=named servicefile={named}"));
    assert!(said.starts_with(&format!("service `named` in `{named}` line 3: `port` ")), "{said}");
    let said = home.error("service=lost");
    assert!(said.contains("service `lost` is not defined in"), "{said}");
    assert!(said.contains("/.pg_service.conf` or "), "{said}");

    let variables = [("PGSERVICE", "both"), ("PGSERVICEFILE", "/nonexistent/f")];
    let said = Home::new().with(&variables).error("");
    let expected = "variable `PGSERVICEFILE`: cannot use service file `/nonexistent/f`: it must be \
                    a text file that this user can read";
    assert_eq!(said, expected);
}

#[test]
fn a_wrong_line_of_a_service_is_named_by_its_place() {
    let home = Home::new();
    let file = home.file("s", 0o644, "[a]\nhosst=h\n[b]\nhost =h\n[c]\nservice=a\n");
    let home = home.with(&[("PGSERVICEFILE", &file)]);
    for (text, expected) in [
        ("service=a", "line 2: there is no connection setting `hosst`; did you mean `host`"),
        ("service=b", "line 4: there is a space before the `=`"),
        ("service=c", "line 6: a service cannot refer to another"),
    ] {
        let said = home.error(text);
        assert!(said.contains(expected), "{said}");
    }
}

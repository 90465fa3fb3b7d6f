//! The sources keep to the map: imports run one way, rooms stay small, and only one names the database driver.

use std::path::{Path, PathBuf};

/// From the outside in: each may import those after it.
const ROOMS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["daemon"],
    &["reactor"],
    &["executor"],
    &["logs"],
    &["mail"],
    &["database"],
    &["embedded"],
    &["config"],
    &["model"],
    &["clock", "report", "tasks"],
];

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut found);
    found
}

fn room(path: &Path) -> String {
    let inside = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
    inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn imports_run_one_way() {
    let rank = |name: &str| ROOMS.iter().position(|rooms| rooms.contains(&name));
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let here = room(&path);
        if here == "lib" {
            continue;
        }
        let own = rank(&here).unwrap_or_else(|| panic!("`{here}` is not on the map"));
        for part in text.split("crate::").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            let Some(other) = rank(&name) else { continue };
            if other < own {
                wrong.push(format!("{}: {here} uses {name}", path.display()));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn only_the_database_room_names_its_driver() {
    for (path, text) in sources() {
        if room(&path) == "database" {
            continue;
        }
        // How much it logs is set by its name.
        let code =
            text.split("#[cfg(test)]").next().unwrap().replace("tokio_postgres=error,deadpool_postgres=error", "");
        for name in ["tokio_postgres", "deadpool"] {
            let named = code.lines().any(|line| line.contains(name) && !line.trim_start().starts_with("//"));
            assert!(!named || path.to_str().unwrap().contains("/tests"), "{} names {name}", path.display());
        }
    }
}

#[test]
fn files_stay_readable() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 600, "{} has {} lines", path.display(), text.lines().count());
    }
}

/// Whoever sets the wall clock shortens no lease, timeout or grace: those who count them know the time since boot, or of tokio's clock.
#[test]
fn the_lease_chain_does_not_read_the_wall_clock() {
    let mut looked = 0;
    for (path, text) in sources() {
        let inside = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap().to_str().unwrap();
        let chain =
            ["executor/", "reactor/", "clock.rs", "database/claim.rs", "database/watch.rs", "database/queries.rs"];
        if !chain.iter().any(|part| inside.starts_with(part)) || inside.ends_with("tests.rs") {
            continue;
        }
        looked += 1;
        let code = text.split("#[cfg(test)]").next().unwrap();
        let lines = code.lines().map(str::trim).filter(|line| !line.starts_with("//"));
        for line in lines {
            // The time that an event tells people.
            if inside == "reactor/herald.rs" && line == "at: jiff::Timestamp::now().to_string()," {
                continue;
            }
            for word in ["SystemTime", "UNIX_EPOCH", "Timestamp::now", "Zoned::now", "CLOCK_REALTIME"] {
                assert!(!line.contains(word), "{inside}: {line}");
            }
        }
    }
    assert!(looked > 20, "{looked}");
    // Those who end trees count a suspension too.
    for file in ["keeper.rs", "guardian.rs"] {
        let (_, text) = sources().into_iter().find(|(path, _)| path.ends_with(file)).unwrap();
        assert!(text.contains("boottime()") && !text.contains("Instant"), "{file}");
    }
}

#[test]
fn unsafe_stands_in_one_place() {
    let places: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| text.contains("expect(unsafe_code"))
        .map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(places, ["fork.rs"]);
}

/// Each row of the tables in docs/FAILURES.md names tests, or says that there is none; and these exist.
#[test]
fn the_tests_named_in_the_table_of_failures_exist() {
    let at = |path: &str| std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let document = at("docs/FAILURES.md");
    let mut named = 0;
    for row in document.lines().filter(|line| line.starts_with("| ")) {
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap().trim();
        let tests: Vec<(&str, &str)> = last.split('`').filter_map(|word| word.rsplit_once("::")).collect();
        assert!(!tests.is_empty() || last == "tests", "{row}");
        for (module, test) in tests {
            let source = at(&format!("tests/{}.rs", module.replace("::", "/")));
            let found = source.match_indices(test).any(|(start, _)| {
                let (before, after) = (&source[..start], &source[start + test.len()..]);
                // A function, or a name that a macro makes one of.
                (before.ends_with("fn ") || before.ends_with([' ', '\n'])) && after.starts_with(['(', '\n', ';', ' '])
            });
            assert!(found, "tests/{module}.rs has no {test}");
            named += 1;
        }
    }
    assert!(named > 30, "{named}");
}

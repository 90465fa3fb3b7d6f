//! When a schedule comes next. Pure: the time comes from the database. Cron's syntax and what it means on the days when clocks
//! change are croner's (Open Cron Pattern Specification, as Vixie cron):
//!
//! * Clocks go forward: a fixed time (one minute, one hour) that does not exist that day comes right after the gap; repeated ones
//!   (`*`, lists, ranges, steps) within the gap are left out.
//! * Clocks go back: a fixed time comes once, the first time; repeated ones come in both hours.

use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The first occurrence of `cron`, by the clock of `time_zone`, strictly after `after`. `None`: it never comes.
///
/// # Errors
/// A sentence for a person: `cron` or `time_zone` has no meaning here.
pub(super) fn next(cron: &str, time_zone: &str, after: Timestamp) -> Result<Option<Timestamp>, String> {
    // The text is a person's: should croner panic over it, that is its refusal, and not the end of every daemon.
    std::panic::catch_unwind(|| compute(cron, time_zone, after))
        .unwrap_or_else(|_| Err(format!("`{cron}` cannot be worked out for `{time_zone}`")))
}

fn compute(cron: &str, time_zone: &str, after: Timestamp) -> Result<Option<Timestamp>, String> {
    let zone = TimeZone::get(time_zone).map_err(|error| format!("time zone `{time_zone}`: {error}"))?;
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let pattern = parser.parse(cron).map_err(|error| format!("cron `{cron}`: {error}"))?;
    match pattern.find_next_occurrence(&after.to_zoned(zone), false) {
        Ok(next) if next.timestamp() > after => Ok(Some(next.timestamp())),
        Ok(next) => Err(format!("cron `{cron}`: {next} was worked out to follow {after}")),
        Err(CronError::TimeSearchLimitExceeded) => Ok(None),
        Err(error) => Err(format!("cron `{cron}`: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BERLIN: &str = "Europe/Berlin";
    const NEW_YORK: &str = "America/New_York";

    /// A cron text, a zone, a time, and the occurrences that follow it; all in UTC.
    const TABLE: &[(&str, &str, &str, &[&str])] = &[
        // Nightly. Berlin skips 02:00-03:00 on 2026-03-29 and 2027-03-28, and has it twice on 2026-10-25 and 2027-10-31.
        (
            "30 2 * * *",
            BERLIN,
            "2026-03-27T12:00:00Z",
            &["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"],
        ),
        (
            "30 2 * * *",
            BERLIN,
            "2027-03-26T12:00:00Z",
            &["2027-03-27T01:30:00Z", "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"],
        ),
        (
            "30 2 * * *",
            BERLIN,
            "2026-10-24T12:00:00Z",
            &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z", "2026-10-27T01:30:00Z"],
        ),
        ("30 2 * * *", BERLIN, "2027-10-30T12:00:00Z", &["2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"]),
        // New York skips 02:00-03:00 on 2026-03-08 and 2027-03-14, and has 01:00-02:00 twice on 2026-11-01 and 2027-11-07.
        (
            "30 2 * * *",
            NEW_YORK,
            "2026-03-06T12:00:00Z",
            &["2026-03-07T07:30:00Z", "2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"],
        ),
        (
            "30 2 * * *",
            NEW_YORK,
            "2027-03-12T12:00:00Z",
            &["2027-03-13T07:30:00Z", "2027-03-14T07:00:00Z", "2027-03-15T06:30:00Z"],
        ),
        ("30 2 * * *", NEW_YORK, "2026-10-31T12:00:00Z", &["2026-11-01T07:30:00Z", "2026-11-02T07:30:00Z"]),
        ("30 1 * * *", NEW_YORK, "2026-10-31T12:00:00Z", &["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]),
        ("30 1 * * *", NEW_YORK, "2027-11-06T12:00:00Z", &["2027-11-07T05:30:00Z", "2027-11-08T06:30:00Z"]),
        // Hourly: each real hour, whatever the clock shows.
        (
            "0 * * * *",
            BERLIN,
            "2026-03-28T23:30:00Z",
            &["2026-03-29T00:00:00Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"],
        ),
        (
            "0 * * * *",
            BERLIN,
            "2026-10-24T23:30:00Z",
            &["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"],
        ),
        (
            "0 * * * *",
            NEW_YORK,
            "2026-03-08T05:30:00Z",
            &["2026-03-08T06:00:00Z", "2026-03-08T07:00:00Z", "2026-03-08T08:00:00Z"],
        ),
        (
            "0 * * * *",
            NEW_YORK,
            "2027-11-07T04:30:00Z",
            &["2027-11-07T05:00:00Z", "2027-11-07T06:00:00Z", "2027-11-07T07:00:00Z"],
        ),
        (
            "*/30 * * * *",
            BERLIN,
            "2027-10-31T00:10:00Z",
            &["2027-10-31T00:30:00Z", "2027-10-31T01:00:00Z", "2027-10-31T01:30:00Z", "2027-10-31T02:00:00Z"],
        ),
        // Two fixed hours are repeated ones, so the one in the gap is left out.
        ("30 2,14 * * *", BERLIN, "2026-03-28T14:00:00Z", &["2026-03-29T12:30:00Z", "2026-03-30T00:30:00Z"]),
        // Days of 23 and 25 hours.
        (
            "0 0 * * *",
            BERLIN,
            "2026-03-28T12:00:00Z",
            &["2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z", "2026-03-30T22:00:00Z"],
        ),
        ("@daily", BERLIN, "2026-10-24T12:00:00Z", &["2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"]),
        ("@weekly", NEW_YORK, "2027-03-10T12:00:00Z", &["2027-03-14T05:00:00Z", "2027-03-21T04:00:00Z"]),
        ("@hourly", "UTC", "2026-12-31T22:59:59.999999Z", &["2026-12-31T23:00:00Z", "2027-01-01T00:00:00Z"]),
        ("0 6 * * MON-FRI", NEW_YORK, "2026-10-30T12:00:00Z", &["2026-11-02T11:00:00Z", "2026-11-03T11:00:00Z"]),
        // Day of month or day of week, as in crontab(5).
        ("0 0 13 * FRI", "UTC", "2026-11-05T00:00:00Z", &["2026-11-06T00:00:00Z", "2026-11-13T00:00:00Z"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00:00Z", &["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]),
        ("0 12 * * 7", "UTC", "2026-11-22T12:00:00Z", &["2026-11-29T12:00:00Z"]),
    ];

    #[test]
    fn occurrences_follow_each_other_over_changes_of_the_clock() {
        for (cron, zone, after, expected) in TABLE {
            let mut at: Timestamp = after.parse().unwrap();
            let found: Vec<String> = expected
                .iter()
                .map(|_| {
                    at = next(cron, zone, at).unwrap().unwrap();
                    at.to_string()
                })
                .collect();
            assert_eq!(found, *expected, "`{cron}` in {zone} after {after}");
        }
    }

    #[test]
    fn the_occurrence_is_strictly_later_whatever_the_fraction() {
        for (after, expected) in [
            ("2026-06-01T00:59:59.999999Z", "2026-06-01T01:00:00Z"),
            ("2026-06-01T01:00:00Z", "2026-06-01T02:00:00Z"),
            ("2026-06-01T01:00:00.000001Z", "2026-06-01T02:00:00Z"),
        ] {
            let found = next("0 * * * *", "UTC", after.parse().unwrap()).unwrap().unwrap();
            assert_eq!(found.to_string(), expected, "after {after}");
        }
    }

    #[test]
    fn what_never_comes_is_none() {
        for cron in ["0 0 30 2 *", "0 0 31 4,6,9,11 *"] {
            assert_eq!(next(cron, BERLIN, "2026-01-01T00:00:00Z".parse().unwrap()), Ok(None), "{cron}");
        }
    }

    #[test]
    fn what_has_no_meaning_is_refused_with_a_sentence() {
        for (cron, zone, says) in [
            ("61 * * * *", "UTC", "cron `61 * * * *`: "),
            ("0 0 * * FOO", "UTC", "cron `0 0 * * FOO`: "),
            ("0 0 0 * * *", "UTC", "5 fields"),
            ("", "UTC", "cron ``: "),
            ("0 0 * * *", "Mars/Olympus", "time zone `Mars/Olympus`: "),
        ] {
            let why = next(cron, zone, "2026-01-01T00:00:00Z".parse().unwrap()).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }
}

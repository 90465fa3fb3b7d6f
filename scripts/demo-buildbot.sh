#!/bin/sh
# A Buildbot master with a worker, a private PostgreSQL and a daemon, all from nothing and on free ports of 127.0.0.1; builds of both executors,
# as psql shows them. Everything is removed at the end, or when you press Ctrl-C. Exit code 0: the builds ended as they should.
#
#     make demo-buildbot           installs Buildbot into .cache/buildbot, builds, and runs this
set -eu
cd "$(dirname "$0")/.."
began=$(date +%s)
buildbot=$PWD/.cache/buildbot/bin
program=${BUILDREACTOR:-${CARGO_TARGET_DIR:-target}/debug/buildreactor}
if [ -s .cache/buildbot.missing ]; then
    echo "there is no Buildbot here, because $(cat .cache/buildbot.missing)" >&2
    exit 1
fi
[ -x "$buildbot/buildbot" ] || { echo "there is no Buildbot in .cache: make demo-buildbot, or scripts/setup.sh demo-buildbot" >&2; exit 1; }
[ -x "$program" ] || { echo "$program is not there: cargo build, or BUILDREACTOR=/path/to/buildreactor" >&2; exit 1; }
case $program in /*) ;; *) program=$PWD/$program ;; esac
# Meant for another database, or another daemon.
for name in $(env | sed -n 's/^\(PG[A-Z]*\|BUILDREACTOR_[A-Z_]*\|DATABASE_URL\)=.*/\1/p'); do
    [ "$name" = BUILDREACTOR_PG_BIN ] || unset "$name"
done

dir=$(mktemp -d "${TMPDIR:-/tmp}/buildreactor-demo.XXXXXX")
# As root the server runs as another user, who has to get there.
chmod 755 "$dir"
master='' worker='' daemon=''

# stop NAME SIGNAL PID: and what does not go within a minute is killed.
stop() {
    [ -n "$3" ] || return 0
    kill "-$2" "$3" 2>/dev/null || return 0
    tries=0
    while kill -0 "$3" 2>/dev/null && [ $tries -lt 600 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
    if kill -9 "$3" 2>/dev/null; then echo "the $1 had to be killed" >&2; fi
    wait "$3" 2>/dev/null || true
}
end() {
    code=$?
    trap '' HUP INT TERM
    trap - EXIT
    if [ $code != 0 ] && [ -z "${interrupted-}" ]; then
        for log in "$dir/daemon.log" "$dir/master/twistd.log" "$dir/oak/twistd.log"; do
            [ ! -s "$log" ] || { echo; echo "The end of $log:"; tail -n 30 "$log"; } >&2
        done
    fi
    # The daemon first: it takes back what it has asked the master for.
    stop daemon INT "$daemon"
    stop worker TERM "$worker"
    stop master TERM "$master"
    rm -rf "$dir"
    if [ $code = 0 ]; then
        echo "The demo went as expected, in $(($(date +%s) - began)) s; master, worker, daemon and server are stopped and removed."
    else
        echo "the demo did not get to its end, and has taken away what it started" >&2
    fi
    exit $code
}
trap end EXIT
trap 'interrupted=yes; exit 130' INT
trap 'interrupted=yes; exit 143' HUP TERM

fail() {
    echo "$*" >&2
    exit 1
}
# until WHAT COMMAND...: within two minutes.
wait_until() {
    what=$1
    shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "waited two minutes for $what"
        for process in $master $worker $daemon; do
            kill -0 "$process" 2>/dev/null || fail "process $process has ended while waiting for $what"
        done
        sleep 0.2
    done
}
url="postgresql:///postgres?host=$dir/postgres/run&user=postgres"
psql() { LC_ALL=C.UTF-8 command psql --no-psqlrc --pset=pager=off --pset=null= -v ON_ERROR_STOP=1 -d "$url" "$@"; }
ask() { psql -qAt -c "$1"; }
is_true() { [ "$(ask "$1" 2>/dev/null)" = t ]; }
# As typed at psql's prompt, and the answer.
show() {
    printf 'postgres=> %s\n' "$1"
    psql -c "$1"
    [ "${1#SELECT}" = "$1" ] && echo || true
}

echo "One Buildbot master with one worker, one PostgreSQL, one daemon, four builds: two of Buildbot's builders, and two scripts that need them.
Everything is temporary and removed at the end, or when you press Ctrl-C.
"
echo "-- A Buildbot master, its configuration deploy/buildbot/master.cfg, and a worker of its own, \`oak\`:"
# shellcheck disable=SC2046 # two words
set -- $("$buildbot/python" -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*[socket.getsockname()[1] for socket in sockets])')
export WWW_PORT="$1" WORKERS_PORT="$2"
secret() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
(
    umask 077
    "$buildbot/buildbot" create-master -q "$dir/master" >"$dir/made"
    secret >"$dir/master/oak.password"
    secret >"$dir/master/buildreactor.password"
    "$buildbot/buildbot-worker" create-worker -q "$dir/oak" "127.0.0.1:$WORKERS_PORT" oak "$(cat "$dir/master/oak.password")" >>"$dir/made"
) || fail "$(cat "$dir/made")"
cp deploy/buildbot/master.cfg "$dir/master/"
twistd() { cd "$1" && exec "$buildbot/twistd" --nodaemon --no_save --pidfile= --logfile=twistd.log -y buildbot.tac >twistd.out 2>&1; }
(twistd "$dir/master") &
master=$!
answers() { "$buildbot/python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$WWW_PORT/api/v2/masters', timeout=10).read()" 2>/dev/null; }
wait_until "the master to answer" answers
# Not earlier, or it waits for a while before it tries again.
(twistd "$dir/oak") &
worker=$!
echo "$("$buildbot/buildbot" --version | head -n 1), http://127.0.0.1:$WWW_PORT"
echo
echo "-- A daemon that knows it, with a PostgreSQL of its own:"
cat >"$dir/buildreactor.toml" <<CONF
[worker]
name = "demo"
slots = 4
state_dir = "$dir/state"
min_free_disk = 0

[buildbot.main]
url = "http://127.0.0.1:$WWW_PORT"
user = "buildreactor"
password_file = "$dir/master/buildreactor.password"
CONF
sed -n '/^\[buildbot/,$p' "$dir/buildreactor.toml"
echo
echo "\$ buildreactor run --embedded $dir/postgres"
"$program" --config "$dir/buildreactor.toml" run --embedded "$dir/postgres" 2>"$dir/daemon.log" &
daemon=$!
wait_until "the daemon to report in" is_true "SELECT count(*) = 1 FROM worker_status WHERE status = 'active'"
echo "\$ buildreactor check | grep buildbot"
"$program" --config "$dir/buildreactor.toml" check --database "$url" >"$dir/check" || true
grep buildbot "$dir/check" | grep -v configuration || cat "$dir/check"
echo

echo "-- Builders of both kinds. The names of the first two are those of the master's; the others are scripts that this daemon runs itself:"
show "INSERT INTO builders (name, executor) VALUES ('linux', 'buildbot'), ('manual', 'buildbot');"
show "INSERT INTO builders (name, script) VALUES
  ('package', 'echo packing \$PROP_REVISION'),
  ('publish', 'echo never, as long as the manual is broken');"
echo "-- A build is an INSERT. \`package\` needs that of \`linux\`, \`publish\` that of \`manual\`:"
show "INSERT INTO build_queue (builder, reason, properties)
VALUES ('linux', 'a push', '{\"branch\": \"main\", \"revision\": \"1a2b3c\", \"variant\": \"release\"}'),
       ('manual', 'a push', '{}')
RETURNING build_id, builder;"
show "INSERT INTO build_queue (builder, needs, properties)
VALUES ('package', '{1}', '{\"revision\": \"1a2b3c\"}'), ('publish', '{2}', '{}')
RETURNING build_id, builder, needs;"
wait_until "the step compile" is_true "SELECT count(*) = 1 FROM build_steps WHERE name = 'compile' AND state = 'running'"
echo "-- While they are built, on Buildbot's worker:"
show "SELECT build_id, builder, waiting_because FROM queue_status;"
show "SELECT build_id, builder, worker, external_worker, step, claim_held FROM running_builds;"
show "SELECT position, name, state FROM build_steps WHERE build_id = 1 ORDER BY position;"
wait_until "all builds to end" is_true "SELECT count(*) = 0 FROM build_queue"
echo "-- How it went:"
show "SELECT build_id, builder, state, ran, exit_code, detail FROM recent_builds ORDER BY build_id;"
show "SELECT build_id, external_worker, external_url FROM build_attempts WHERE external_url IS NOT NULL ORDER BY build_id;"
show "SELECT build_id, position, name, state, finished_at - started_at AS ran, detail FROM build_steps ORDER BY build_id, position;"
echo "-- Their logs came while they ran, those of all steps in one:"
printf 'postgres=> %s\n' "SELECT build_log_text(id) FROM builds WHERE id IN (1, 2) ORDER BY id;"
ask "SELECT build_log_text(id) FROM builds WHERE id IN (1, 2) ORDER BY id;"
ended=$(ask "SELECT string_agg(builder || ' ' || state, ', ' ORDER BY id) FROM builds")
[ "$ended" = "linux passed, manual failed, package passed, publish skipped" ] || fail "the builds ended otherwise than they should: $ended"
steps=$(ask "SELECT string_agg(name || ' ' || state, ', ' ORDER BY build_id, position) FROM build_steps WHERE position > 1")
[ "$steps" = "checkout passed, compile passed, test passed, spelling failed" ] || fail "the steps are not those of the builds: $steps"

#!/bin/sh
# Sends a test mail to a real mail server, Exim of the distribution (Debian: exim4-daemon-light or -heavy), with STARTTLS and AUTH, and shows
# what was delivered. It runs on a port of its own with a configuration of its own; nothing of it stays. Exit code 0: a wrong password was
# refused, and with the right one a mail was delivered, encrypted.
#
#     scripts/mta.sh DATABASE            EXIM=/path/to/exim4 names another program, PORT another port
set -eu
database=${1:?which database? (a connection string; it is only looked at)}
exim=${EXIM:-/usr/sbin/exim4}
port=${PORT:-5587}
program=${BUILDREACTOR:-${CARGO_TARGET_DIR:-target}/debug/buildreactor}
[ -x "$exim" ] || { echo "$exim is not installed: apt-get install exim4-daemon-light" >&2; exit 1; }
[ -x "$program" ] || { echo "$program is not there: cargo build, or BUILDREACTOR=/path/to/buildreactor" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "Exim wants to be root, to become the user that it runs as" >&2; exit 1; }

dir=$(mktemp -d "${TMPDIR:-/tmp}/buildreactor-mta.XXXXXX")
pid=
# Not before it has ended, or it makes its folder for logs again.
trap '[ -z "$pid" ] || { kill "$pid" && wait "$pid"; } 2>/dev/null || true; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$dir/spool" "$dir/log" "$dir/mail"
chmod 755 "$dir"
# No authority: a certificate that could sign others is not taken for a server's.
cat > "$dir/openssl.conf" <<CONF
[req]
distinguished_name = name
x509_extensions = server
prompt = no
[name]
CN = localhost
[server]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:localhost
CONF
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -config "$dir/openssl.conf" \
    -keyout "$dir/key.pem" -out "$dir/cert.pem" 2>"$dir/openssl.log" || { cat "$dir/openssl.log" >&2; exit 1; }
cat > "$dir/exim.conf" <<CONF
exim_user = nobody
exim_group = nogroup
never_users =
primary_hostname = localhost
domainlist local_domains = example.org
spool_directory = $dir/spool
log_file_path = $dir/log/%s
keep_environment =
exim_path = $exim
pid_file_path = $dir/exim.pid
daemon_smtp_ports = $port
local_interfaces = 127.0.0.1
tls_advertise_hosts = *
tls_certificate = $dir/cert.pem
tls_privatekey = $dir/key.pem
auth_advertise_hosts = \${if eq{\$tls_in_cipher}{}{}{*}}
acl_smtp_rcpt = rcpt
acl_smtp_data = data
begin acl
rcpt:
  accept authenticated = *
  deny message = who are you
data:
  accept
begin routers
here:
  driver = accept
  transport = file
begin transports
file:
  driver = appendfile
  file = $dir/mail/inbox
  user = nobody
  group = nogroup
  delivery_date_add
  envelope_to_add
begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_condition = \${if and{{eq{\$auth2}{builds}}{eq{\$auth3}{geheim}}}}
  server_set_id = \$auth2
CONF
chown -R nobody:nogroup "$dir/spool" "$dir/log" "$dir/mail" "$dir/key.pem"
"$exim" -C "$dir/exim.conf" -bdf > "$dir/exim.out" 2>&1 &
pid=$!
tries=0
until openssl s_client -connect "127.0.0.1:$port" -starttls smtp < /dev/null > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { cat "$dir/exim.out" "$dir"/log/* >&2; exit 1; }
    sleep 0.1
done

check() {
    BUILDREACTOR_MAIL_URL="smtp://localhost:$port" BUILDREACTOR_MAIL_FROM='Bäuerin <builds@example.org>' BUILDREACTOR_MAIL_USER=builds \
        BUILDREACTOR_MAIL_CA_FILE="$dir/cert.pem" BUILDREACTOR_WORKER_STATE_DIR="$dir" BUILDREACTOR_WORKER_MIN_FREE_DISK=0 \
        "$program" check --database "$database" --mail ann@example.org >"$dir/check" 2>&1 || true
    grep ' mail: ' "$dir/check" || { cat "$dir/check" >&2; exit 1; }
}
fail() {
    echo "$*" >&2
    cat "$dir"/log/* "$dir/exim.out" >&2
    exit 1
}
echo "With a wrong password:"
BUILDREACTOR_MAIL_PASSWORD=wrong check
grep -q '^PROBLEM .*(535)' "$dir/check" || fail "Exim did not refuse it"
echo "With the right one:"
BUILDREACTOR_MAIL_PASSWORD=geheim check
# Exim delivers after it has answered; this is the last that it says of a mail. With a configuration that is not the distribution's it
# gives up being root for that, and says it where it was started instead of in its log.
tries=0
until cat "$dir/log/main" "$dir/exim.out" | grep -q ' Completed$'; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || fail "nothing was delivered"
    sleep 0.1
done
echo "Delivered:"
cat "$dir/mail/inbox"
echo "Exim's log:"
cat "$dir/log/main" "$dir/exim.out"
grep -q ' P=esmtpsa X=TLS.* A=plain:builds ' "$dir/log/main" || fail "not with STARTTLS and AUTH"

//! The shell between us and the server: it outlives us by as long as it takes to stop the server and tidy up.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::StopMode;

/// What the watchdog runs, as the server's user, in a process group of its own.
///
/// Its stdin is a pipe only we hold: end of file means that we are gone, however that came. Its stdout takes the
/// server's process id back; its stderr is the folder, open and locked, so the lock lasts as long as the watchdog.
///
/// - We are killed: the reader sees the end of file, tells the shell, which stops the server (fast), waits for it and
///   removes the folder of a throw-away. It says so every second, because a signal sent between fork and exec of
///   the server is lost, and `initdb` is left to finish.
/// - Somebody sends SIGTERM to the shell, or to all of us as a supervisor does: the same.
/// - Somebody kills the shell with SIGKILL: the reader still hears orders and our end, and does the rest itself.
/// - Ctrl-C at a terminal goes to its foreground group, which is not this one.
/// - The server crashes: the shell waits for us to say what becomes of the folder, or to go.
const SCRIPT: &str = r#"
folder=$1 log=$2 data=$3 run=$4 initdb=$5 option=$6  # folder: to remove in the end, or empty
shift 6                                              # left: postgres and its arguments
pid= born= gone= keep=
birth() { read -r stat <"/proc/$1/stat" && stat=${stat##*) } && set -- $stat && echo "${20}"; } 2>/dev/null  # proc(5): starttime
hit() { [ "$(birth "$2")" = "$3" ] && kill "-$1" "$2" 2>/dev/null; }  # not who has the number by now
shell=$(birth $$)
trap '[ -z "$pid" ] || hit INT "$pid" "$born"; gone=1' TERM INT HUP  # INT: PostgreSQL's fast shutdown
trap keep=1 USR1
trap gone=1 USR2
umask 077
exec 3<&0 4>&1 5<&2 </dev/null >>"$log" 2>&1  # 3: orders, 4: answer, 5: the lock

serve() {
    mkdir -p "$run" && chmod 700 "$run" || exit
    if ! [ -e "$data" ]; then  # made elsewhere and renamed: an interrupted initdb is never taken for data
        rm -rf "$data.new"
        "$initdb" -D "$data.new" -A trust -U postgres --locale=C --encoding=UTF8 --no-instructions "$option" &&
            mv "$data.new" "$data" || exit
    fi
    exec "$@"
}
serve "$@" 3<&- 4>&- 5<&- &
pid=$!
born=$(birth "$pid")
[ -z "$gone" ] || kill -INT "$pid"
echo "$pid" >&4
exec 4>&-

(   # the reader; what is meant for the whole group is the shell's to answer
    trap '' TERM INT
    while read -r signal after; do
        case $after in
        keep) keep=1; hit USR1 $$ "$shell" ;;
        *) hit USR2 $$ "$shell" ;;
        esac
        hit "$signal" "$pid" "$born"  # it may have crashed
    done
    while hit TERM $$ "$shell" || hit INT "$pid" "$born"; do sleep 1; done
    [ -n "$keep" ] || [ -z "$folder" ] || rm -rf "$folder"
) <&3 &
reader=$!
exec 3<&-

while wait "$pid"; status=$?; hit 0 "$pid" "$born"; do :; done  # a trap ends wait early
[ -n "$gone$keep" ] || wait "$reader"
[ -n "$keep" ] || [ -z "$folder" ] || rm -rf "$folder"
trap '' USR2
kill -USR2 0  # the reader and its sleep: all that is left in our process group (HUP may be ignored, by nohup)
exit "$status"
"#;

/// What becomes of a throw-away's folder when the server has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Keep,
    Remove,
}

/// Paths of one server, for the script.
pub(super) struct Paths<'a> {
    /// The folder to remove in the end; none for a kept one.
    pub throw_away: Option<&'a Path>,
    pub log: &'a Path,
    pub data: &'a Path,
    pub run: &'a Path,
    pub initdb: &'a Path,
}

/// A running watchdog with its server. Dropping it closes the pipe, which is an order to stop.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    orders: Option<ChildStdin>,
    /// The server: first the shell function that prepares the data, then, by exec, the postmaster.
    pub pid: i32,
}

impl Watchdog {
    /// Starts watchdog and server. `sh` is a command for the server's user, `postgres` its argument list.
    pub fn spawn(mut sh: Command, paths: &Paths, lock: Stdio, postgres: Command) -> std::io::Result<Watchdog> {
        // A throw-away needs no syncing; what is kept is worth checksums.
        let option = if paths.throw_away.is_some() { "--no-sync" } else { "--data-checksums" };
        sh.args(["-c", SCRIPT, "buildreactor-postgres"])
            .arg(paths.throw_away.unwrap_or(Path::new("")))
            .args([paths.log, paths.data, paths.run, paths.initdb])
            .arg(option)
            .arg(postgres.get_program())
            .args(postgres.get_args())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(lock);
        let mut child = sh.spawn()?;
        let orders = child.stdin.take();
        let mut answer = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut answer)?;
        }
        match answer.trim().parse() {
            Ok(pid) => Ok(Watchdog { child, orders, pid }),
            Err(_) => {
                drop(orders);
                let status = child.wait()?;
                Err(std::io::Error::other(format!("it ended at once ({status}); can its log be written?")))
            }
        }
    }

    /// Whether the server's process is there. Also false when the watchdog was killed, whose server is then ending.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None)) && is_alive(self.pid)
    }

    /// Sends an order and waits until watchdog and server are gone. False: they are not, after `patience`; the server
    /// still runs then and a stricter order may follow.
    pub fn end(&mut self, mode: StopMode, after: After, patience: Duration) -> bool {
        let signal = match mode {
            StopMode::Smart => "TERM",
            StopMode::Fast => "INT",
            StopMode::Immediate => "QUIT",
        };
        let after = match after {
            After::Keep => "keep",
            After::Remove => "remove",
        };
        if let Some(orders) = &mut self.orders
            && let Err(error) = writeln!(orders, "{signal} {after}")
        {
            // Nobody reads any more: then it has ended already, which is what we look for below.
            tracing::debug!(%error, "the server's watchdog takes no orders");
        }
        let deadline = Instant::now() + patience;
        loop {
            if !matches!(self.child.try_wait(), Ok(None)) && !is_alive(self.pid) {
                self.orders = None;
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            pause();
        }
    }
}

#[cfg(test)]
impl Watchdog {
    pub fn child_id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn close_pipe(&mut self) {
        self.orders = None;
    }
}

/// Whether a process of this id exists, whoever it belongs to.
pub(super) fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// Between two looks at something only looking can tell. Sleeps the thread: this room is synchronous.
pub(super) fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_somebody_elses_by_now_takes_no_signal() {
        let functions: Vec<&str> =
            SCRIPT.lines().filter(|line| line.starts_with("birth()") || line.starts_with("hit()")).collect();
        assert_eq!(functions.len(), 2);
        let run = |order: &str| {
            let script = format!("{}\n{order}", functions.join("\n"));
            Command::new("sh").args(["-c", &script]).status().unwrap().success()
        };
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = process.id();
        assert!(!run(&format!("hit KILL {pid} 1")) && !run(&format!("hit KILL {pid} ''")));
        // Process 1 was born long before. Two processes of this test can be born in the same hundredth of a second, the unit of proc(5).
        assert!(!run(&format!("born=$(birth 1); hit KILL {pid} \"$born\"")));
        assert!(process.try_wait().unwrap().is_none(), "it was not the one");
        assert!(run(&format!("hit 0 {pid} \"$(birth {pid})\" && hit KILL {pid} \"$(birth {pid})\"")));
        assert!(!process.wait().unwrap().success());
        assert!(!run(&format!("hit 0 {pid} 1")));
    }
}

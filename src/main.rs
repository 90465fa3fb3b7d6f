//! Parse, call, map to an exit code; nothing else.

fn main() -> std::process::ExitCode {
    buildreactor::cli::main()
}

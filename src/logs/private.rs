//! Files and folders of attempts, for the worker's user alone: a log, or a row of `builds`, may tell more than others on the machine should
//! know. The umask may leave out more than it should, or less, so it does not count.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Makes a folder, and those above it, unless it is there. Mode 0700; those above it as the umask has it.
///
/// # Errors
/// It cannot be made, or is another user's.
pub fn make_dir(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        std::fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if !path.is_dir() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o700))
}

/// Opens a file with `options`, and gives it the mode 0600.
///
/// # Errors
/// It cannot be opened, or is another user's.
pub fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Writes a file of mode 0600 as a whole.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    open(OpenOptions::new().write(true).create(true).truncate(true), path)?.write_all(bytes)
}

//! A daemon of an ordinary user, while the tests run as root.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::{Launch, TempDir, copy_program, server, temp_dir};

/// How to launch it, and the folder of the program, which such a user could not reach where it was built. Without root: as ourselves.
pub fn ordinary() -> (Launch, TempDir) {
    let folder = temp_dir();
    let mut launch = Launch::default();
    if nix::unistd::geteuid().is_root() {
        // The one user who may enter the folder of the server's socket.
        let owner = std::fs::metadata(server().socket_dir()).unwrap();
        assert_ne!(owner.uid(), 0);
        launch.user = Some((owner.uid(), owner.gid()));
        launch.program = folder.path().join("buildreactor");
        copy_program(&launch.program);
        for path in [folder.path(), &launch.program] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    (launch, folder)
}

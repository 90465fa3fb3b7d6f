//! What a keeper and one of its guardians tell each other: in memory that both have, because either may be stopped for long, and a
//! socket fills up.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

use super::protocol::Status;

/// Behind the end of the lease.
const STATUS_AT: u64 = 8;

/// One descriptor, made before the fork; a worker may have a thousand of them.
pub struct Notes(File);

impl Notes {
    /// With the end of the lease, on the clock of leases.
    ///
    /// # Errors
    /// No memory, or no descriptor.
    pub fn new(until: Duration) -> io::Result<Notes> {
        // Some kernels refuse memory that could be executed (vm.memfd_noexec), older ones do not know how to ask for other (before 6.3).
        let plain = MemfdFlags::CLOEXEC;
        let made = match memfd_create(c"attempt", plain | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(c"attempt", plain),
            made => made,
        };
        let notes = Notes(File::from(made?));
        notes.renew(until)?;
        Ok(notes)
    }

    /// The keeper: the lease lasts until then.
    ///
    /// # Errors
    /// Not noted.
    pub fn renew(&self, until: Duration) -> io::Result<()> {
        self.0.write_all_at(&super::millis(until).to_ne_bytes(), 0)
    }

    /// The guardian: until when it lasts. Eight bytes that lie together are copied at once.
    ///
    /// # Errors
    /// Unknown.
    pub fn until(&self) -> io::Result<Duration> {
        let mut until = [0; STATUS_AT as usize];
        self.0.read_exact_at(&mut until, 0)?;
        Ok(Duration::from_millis(u64::from_ne_bytes(until)))
    }

    /// The guardian, at its end: how the attempt ended. A disk may be full.
    ///
    /// # Errors
    /// Not noted, or in part.
    pub fn leave(&self, status: &Status) -> io::Result<()> {
        self.0.write_all_at(&serde_json::to_vec(status)?, STATUS_AT)
    }

    /// The keeper, once the guardian has been reaped. `None`: it had no time to note anything.
    pub fn left(&self) -> Option<Status> {
        let size = self.0.metadata().ok()?.len().checked_sub(STATUS_AT)?;
        let mut text = vec![0; usize::try_from(size).ok()?];
        self.0.read_exact_at(&mut text, STATUS_AT).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::End;
    use super::*;

    #[test]
    fn the_newest_end_of_the_lease_counts_and_the_status_beside_it() {
        let notes = Notes::new(Duration::from_millis(5)).unwrap();
        for ms in 6..2000 {
            notes.renew(Duration::from_millis(ms)).unwrap();
        }
        assert_eq!(notes.until().unwrap(), Duration::from_millis(1999));
        assert!(notes.left().is_none());
        notes.leave(&Status::without_process(End::GuardianGone)).unwrap();
        assert!(matches!(notes.left().unwrap().end, End::GuardianGone));
        assert_eq!(notes.until().unwrap(), Duration::from_millis(1999));
    }
}

//! The clock of leases.

use std::time::Duration;

/// Time since boot, suspended time included (CLOCK_BOOTTIME): a laptop's sleep counts against limits and leases. The same for all
/// processes of a machine.
pub fn boottime() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

//! The clock of leases, and what keeps a flood at a steady pace.

use std::time::Duration;

/// Time since boot, suspended time included (CLOCK_BOOTTIME): a laptop's sleep counts against limits and leases. The same for all
/// processes of a machine.
pub fn boottime() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Folds a flood: some pass at once, the others one by one at a steady pace.
#[derive(Debug)]
pub struct Fold {
    /// Between two of a flood.
    pace: Duration,
    /// How many pass at once after a time of quiet.
    burst: u32,
    /// When what has passed would have passed at the steady pace.
    paid_until: tokio::time::Instant,
}

impl Fold {
    /// After a time of quiet `burst` pass at once, and from then on one each `pace`.
    pub fn new(pace: Duration, burst: u32) -> Fold {
        Fold { pace, burst: burst.max(1), paid_until: tokio::time::Instant::now() }
    }

    /// When the next one may pass; it may be in the past.
    pub fn next(&self) -> tokio::time::Instant {
        let ahead = self.pace * (self.burst - 1);
        self.paid_until.checked_sub(ahead).unwrap_or(self.paid_until)
    }

    /// Something passes that counts as `cost` of them. What costs more than is left passes too; the next one waits for longer then.
    pub fn pass(&mut self, cost: u32) {
        self.paid_until = self.paid_until.max(tokio::time::Instant::now()) + self.pace * cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fold_lets_some_pass_at_once_and_then_keeps_its_pace() {
        let start = tokio::time::Instant::now();
        let mut fold = Fold::new(Duration::from_millis(100), 3);
        let mut passed = Vec::new();
        while passed.len() < 6 {
            tokio::time::sleep_until(fold.next()).await;
            fold.pass(1);
            passed.push(start.elapsed().as_millis());
        }
        // The sleep of tokio ends up to a millisecond late.
        let expected = [0, 0, 0, 100, 200, 300];
        assert!(passed.iter().zip(expected).all(|(at, expected)| at.abs_diff(expected) <= 2), "{passed:?}");
        // Quiet fills it again, and no further than before.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let quiet = tokio::time::Instant::now();
        for _ in 0..4 {
            tokio::time::sleep_until(fold.next()).await;
            fold.pass(1);
        }
        assert!(quiet.elapsed().as_millis().abs_diff(100) <= 2, "{:?}", quiet.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_costs_much_passes_at_once_and_makes_the_next_wait() {
        let start = tokio::time::Instant::now();
        let mut fold = Fold::new(Duration::from_millis(10), 20);
        assert!(fold.next() <= start);
        fold.pass(500);
        assert_eq!(fold.next() - start, Duration::from_millis(5000 - 190));
    }
}

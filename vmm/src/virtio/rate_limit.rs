//! Token buckets, and a timer that says when they hold enough again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// Limits on operations and bytes; zero means none of that kind, and a burst of zero means one second's worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes per second.
    pub bytes_per_second: u64,
    /// Operations per second.
    pub operations_per_second: u64,
    /// Size of the byte bucket.
    pub burst_bytes: u64,
    /// Size of the operation bucket.
    pub burst_operations: u64,
}

const NANOS: i128 = 1_000_000_000;

/// A bucket of tokens, refilled continuously.
///
/// What costs more than the bucket holds passes when the bucket is full and leaves it in debt, so that a large request is
/// slowed down rather than stuck.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bucket {
    per_second: u64,
    size: u64,
    /// In billionths of a token; negative is debt. `u64::MAX` tokens fit.
    level: i128,
    filled: Instant,
}

impl Bucket {
    fn new(per_second: u64, burst: u64, now: Instant) -> Option<Self> {
        let size = if burst == 0 { per_second } else { burst };
        (per_second > 0).then(|| Self {
            per_second,
            size,
            level: i128::from(size) * NANOS,
            filled: now,
        })
    }

    fn refill(&mut self, now: Instant) {
        // 2^64 ns are 584 years; a process does not last so long.
        let nanos = u64::try_from(now.saturating_duration_since(self.filled).as_nanos()).unwrap_or(u64::MAX);
        let gained = i128::from(nanos).saturating_mul(i128::from(self.per_second));
        self.level = self.level.saturating_add(gained).min(i128::from(self.size) * NANOS);
        self.filled = now;
    }

    /// How long until `cost` can be paid; zero: now.
    fn wait(&self, cost: u64) -> Duration {
        let missing = i128::from(cost.min(self.size)) * NANOS - self.level;
        let nanos = (missing.max(0) + i128::from(self.per_second) - 1) / i128::from(self.per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn pay(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(i128::from(cost) * NANOS);
    }
}

/// A rate limiter with its timer. Without limits it has none, and costs two comparisons.
#[derive(Debug)]
pub struct RateLimiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    timer: Option<TimerFd>,
}

impl RateLimiter {
    /// Full buckets.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(limit: RateLimit) -> io::Result<Self> {
        let now = Instant::now();
        let operations = Bucket::new(limit.operations_per_second, limit.burst_operations, now);
        let bytes = Bucket::new(limit.bytes_per_second, limit.burst_bytes, now);
        let limited = operations.is_some() || bytes.is_some();
        Ok(Self {
            operations,
            bytes,
            timer: limited.then(TimerFd::new).transpose()?,
        })
    }

    /// Takes one operation of so many bytes. False: not now; the timer becomes readable when it is worth another try.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn take(&mut self, bytes: u64) -> io::Result<bool> {
        match self.take_at(bytes, Instant::now()) {
            Duration::ZERO => Ok(true),
            wait => {
                if let Some(timer) = &mut self.timer {
                    timer.reset(wait, None)?;
                }
                Ok(false)
            }
        }
    }

    /// What becomes readable when it is worth another try; None: nothing is limited.
    pub fn timer(&self) -> Option<RawFd> {
        self.timer.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The timer has fired: makes it unreadable.
    pub fn acknowledge(&mut self) {
        if let Some(timer) = &mut self.timer {
            // Stopping the timer is what clears it without ever blocking; it can only fail for a bad descriptor.
            let _ = timer.clear();
        }
    }

    fn take_at(&mut self, bytes: u64, now: Instant) -> Duration {
        let costs = [(&mut self.operations, 1), (&mut self.bytes, bytes)];
        let mut wait = Duration::ZERO;
        let mut payers = Vec::new();
        for (bucket, cost) in costs {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(cost));
                payers.push((bucket, cost));
            }
        }
        // All or none: an operation that has to wait for bytes has not used up an operation.
        if wait.is_zero() {
            for (bucket, cost) in payers {
                bucket.pay(cost);
            }
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(limit: RateLimit) -> (RateLimiter, Instant) {
        let limiter = RateLimiter::new(limit).unwrap();
        let start = limiter
            .bytes
            .as_ref()
            .or(limiter.operations.as_ref())
            .map_or_else(Instant::now, |b| b.filled);
        (limiter, start)
    }

    #[test]
    fn no_limit_never_waits() {
        let (mut limiter, start) = limiter(RateLimit::default());
        assert_eq!(limiter.take_at(u64::MAX, start), Duration::ZERO);
    }

    #[test]
    fn an_empty_bucket_says_when_it_holds_enough() {
        let (mut limiter, start) = limiter(RateLimit {
            bytes_per_second: 1000,
            ..RateLimit::default()
        });
        assert_eq!(limiter.take_at(1000, start), Duration::ZERO);
        assert_eq!(limiter.take_at(500, start), Duration::from_millis(500));
        assert_eq!(
            limiter.take_at(500, start + Duration::from_millis(499)),
            Duration::from_millis(1)
        );
        assert_eq!(limiter.take_at(500, start + Duration::from_millis(500)), Duration::ZERO);
    }

    #[test]
    fn more_than_the_bucket_holds_passes_once_and_is_paid_for_later() {
        let (mut limiter, start) = limiter(RateLimit {
            bytes_per_second: 1000,
            burst_bytes: 100,
            ..RateLimit::default()
        });
        assert_eq!(limiter.take_at(1100, start), Duration::ZERO);
        assert_eq!(limiter.take_at(1, start), Duration::from_millis(1001));
    }

    #[test]
    fn waiting_for_bytes_uses_up_no_operation() {
        let (mut limiter, start) = limiter(RateLimit {
            bytes_per_second: 10,
            operations_per_second: 1,
            ..RateLimit::default()
        });
        limiter.bytes.as_mut().unwrap().level = 0;
        assert_eq!(limiter.take_at(10, start), Duration::from_secs(1));
        assert_eq!(limiter.take_at(0, start), Duration::ZERO);
        assert_eq!(limiter.take_at(0, start), Duration::from_secs(1));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let max = RateLimit {
            bytes_per_second: u64::MAX,
            operations_per_second: u64::MAX,
            burst_bytes: u64::MAX,
            burst_operations: u64::MAX,
        };
        let (mut limiter, start) = limiter(max);
        for years in 0..4 {
            limiter.take_at(u64::MAX, start + Duration::from_secs(years * 31_536_000));
        }
    }
}

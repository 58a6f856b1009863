//! How long ago, in Docker's words: the STATUS column of `ps`.

use guest_api::health::HealthStatus;
use jiff::Timestamp;

use super::record::View;
use super::table::Phase;

/// `Up 2 minutes`, `Exited (0) 3 hours ago`, `Created`, …
pub fn status(view: &View, now: Timestamp) -> String {
    let last = &view.record.last;
    let ago = |at: Option<Timestamp>| at.map_or_else(String::new, |at| format!(" {} ago", human(now, at)));
    match view.phase {
        Phase::Created => "Created".to_owned(),
        Phase::Running | Phase::Paused => {
            let since = view.live.as_ref().map_or(now, |live| live.started_at);
            let more = match &last.health {
                _ if view.phase == Phase::Paused => " (Paused)".to_owned(),
                Some(health) if health.status == HealthStatus::Starting => " (health: starting)".to_owned(),
                Some(health) => format!(" ({})", health.status.word()),
                None => String::new(),
            };
            format!("Up {}{more}", human(now, since))
        }
        Phase::Restarting => format!("Restarting ({}){}", last.exit_code, ago(last.finished_at)),
        // A container that could not be started never finished.
        Phase::Exited if last.finished_at.is_none() => "Created".to_owned(),
        Phase::Exited => format!("Exited ({}){}", last.exit_code, ago(last.finished_at)),
        Phase::Removing => "Removal In Progress".to_owned(),
        Phase::Dead => "Dead".to_owned(),
    }
}

/// The span between two moments, roughly.
fn human(now: Timestamp, then: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second()).max(0);
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::record::{Live, tests::record};
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn view(phase: Phase) -> View {
        let mut record = record();
        record.last.exit_code = 7;
        record.last.finished_at = Some(at(1_000_000));
        let live = phase.is_live().then(|| Live { pid: 1, started_at: at(1_000_000) });
        View { record: Arc::new(record), phase, live, runs_ended: 0, removed: false }
    }

    #[test]
    fn spans_are_dockers() {
        let check = |seconds: i64, expected: &str| {
            assert_eq!(human(at(1_000_000 + seconds), at(1_000_000)), expected)
        };
        check(-5, "Less than a second");
        check(1, "1 second");
        check(59, "59 seconds");
        check(60, "About a minute");
        check(150, "2 minutes");
        check(3600, "About an hour");
        check(3 * 3600, "3 hours");
        check(3 * 86400, "3 days");
        check(20 * 86400, "2 weeks");
        check(100 * 86400, "3 months");
        check(1000 * 86400, "2 years");
    }

    #[test]
    fn states_read_as_in_ps() {
        let check = |phase, expected: &str| assert_eq!(status(&view(phase), at(1_000_120)), expected);
        check(Phase::Created, "Created");
        check(Phase::Running, "Up 2 minutes");
        check(Phase::Paused, "Up 2 minutes (Paused)");
        check(Phase::Exited, "Exited (7) 2 minutes ago");
        check(Phase::Restarting, "Restarting (7) 2 minutes ago");
    }
}

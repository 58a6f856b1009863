//! What the kernel command line says to the agent. Words that are not ours are the kernel's business.

use std::time::Duration;

use crate::idle;

/// The agent's options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// `engine.debug`: log decisions, and put the log on the console as well.
    pub debug: bool,
    /// `engine.idle=SECONDS`: when a machine that is left alone lets go of its caches; zero is never.
    pub quiet: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { debug: false, quiet: idle::QUIET }
    }
}

impl Options {
    /// Reads the options out of the text of `/proc/cmdline`. A value of `0` switches an option off; the last word
    /// wins, as with the kernel's own options.
    pub fn parse(cmdline: &str) -> Self {
        let mut options = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, "1"));
            match name {
                "engine.debug" => options.debug = value != "0",
                // What is no number of seconds is not worth a machine that does not start.
                "engine.idle" => options.quiet = value.parse().map_or(options.quiet, Duration::from_secs),
                _ => {}
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_words_count_and_the_last_wins() {
        let debug = |cmdline| Options::parse(cmdline).debug;
        assert!(!debug(""));
        assert!(!debug("console=ttyS0 quiet debug engine.debugger\n"));
        assert!(debug("console=ttyS0 engine.debug quiet\n"));
        assert!(debug("engine.debug=0 engine.debug=1"));
        assert!(!debug("engine.debug engine.debug=0"));
    }

    #[test]
    fn idle_is_a_number_of_seconds() {
        let quiet = |cmdline| Options::parse(cmdline).quiet;
        assert_eq!(quiet("engine.idle=5 engine.idle=x quiet"), Duration::from_secs(5));
        assert_eq!(quiet("engine.idle=0"), Duration::ZERO);
        assert_eq!(quiet("engine.idle=-1 engine.idler=7"), idle::QUIET);
    }
}

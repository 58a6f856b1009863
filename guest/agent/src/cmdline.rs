//! What the kernel command line says to the agent. Words that are not ours are the kernel's business.

/// The agent's options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `engine.debug`: log decisions, and put the log on the console as well.
    pub debug: bool,
}

impl Options {
    /// Reads the options out of the text of `/proc/cmdline`. A value of `0` switches an option off; the last word
    /// wins, as with the kernel's own options.
    pub fn parse(cmdline: &str) -> Self {
        let mut options = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, "1"));
            if name == "engine.debug" {
                options.debug = value != "0";
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
}

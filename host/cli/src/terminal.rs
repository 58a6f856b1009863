//! The user's terminal: raw mode that is always undone, its size, and the keys that detach.

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::os::fd::AsFd;

/// Raw mode on standard input for as long as this lives.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    pub(crate) fn enter() -> rustix::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing is left to do when the terminal itself is gone.
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}

/// Columns and rows of the terminal on standard output, if there is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdout().as_fd()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Finds Docker's detach keys, Ctrl-P Ctrl-Q, in what is typed.
#[derive(Debug, Default)]
pub(crate) struct DetachKeys {
    /// A Ctrl-P was typed and held back.
    held: bool,
}

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

impl DetachKeys {
    /// What of `typed` is input for the container, and whether the keys were typed (nothing after them counts).
    pub(crate) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut input = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            if std::mem::take(&mut self.held) {
                if byte == CTRL_Q {
                    return (input, true);
                }
                input.push(CTRL_P);
            }
            if byte == CTRL_P {
                self.held = true;
            } else {
                input.push(byte);
            }
        }
        (input, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_found_also_when_they_come_apart() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"ls\n\x10"), (b"ls\n".to_vec(), false));
        assert_eq!(keys.filter(b"\x11rest"), (Vec::new(), true));
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"\x10\x10a\x11"), (b"\x10\x10a\x11".to_vec(), false));
    }
}

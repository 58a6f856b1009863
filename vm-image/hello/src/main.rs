//! What the bundled image `hello` runs: says that the whole way from a terminal to a process in a container works.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::{fs, process};

fn main() -> io::Result<()> {
    let greeting = greeting(&kernel_value("osrelease"), &kernel_value("hostname"), process::id());
    io::stdout().write_all(greeting.as_bytes())
}

/// A value that the kernel publishes about this system, or a word saying that it does not.
fn kernel_value(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/kernel/{name}"))
        .map_or_else(|_| "unknown".to_owned(), |value| value.trim_end().to_owned())
}

fn greeting(release: &str, hostname: &str, pid: u32) -> String {
    format!(
        "
Hello! This text was written by a process inside a container, so your engine works.

  kernel      Linux {release}
  hostname    {hostname}
  process     {pid}

How it got here:
  1. your command reached the engine through its socket, waking the virtual machine if it slept;
  2. the engine found the image `hello`, which is bundled and needs no registry;
  3. it made a container with its own processes, network and file system from that image;
  4. a shim started this program in it and passed its output back to your terminal.

Next, where a registry can be reached:
  engine run --rm -it debian bash

"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_names_kernel_host_and_process() {
        let text = greeting("6.12.1", "3f2a", 1);
        for part in ["Linux 6.12.1", "hostname    3f2a", "process     1\n"] {
            assert!(text.contains(part), "{part} is missing from {text}");
        }
    }
}

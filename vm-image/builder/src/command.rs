//! Running a program of the build machine: its output, or a sentence with what it wrote to stderr.

use std::ffi::OsStr;
use std::io;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Runs to the end and returns stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    if !output.status.success() {
        bail!("{}", failure(command, &output));
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed something that is not text", line(command)))
}

/// Runs to the end, whatever the exit status.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    // Messages are parsed and shown: no translations.
    command.env("LC_ALL", "C.UTF-8").output().map_err(|error| cannot_run(command, &error))
}

/// The sentence for a program that could not even be started.
pub(crate) fn cannot_run(command: &Command, error: &io::Error) -> anyhow::Error {
    let program = command.get_program().to_string_lossy();
    if error.kind() == io::ErrorKind::NotFound {
        anyhow::anyhow!(
            "the program `{program}` is not installed; `installer/setup` installs what a build needs"
        )
    } else {
        anyhow::anyhow!("cannot run `{}`: {error}", line(command))
    }
}

fn failure(command: &Command, output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    format!("`{}` failed ({}): {}", line(command), output.status, stderr.trim())
}

fn line(command: &Command) -> String {
    let words: Vec<_> =
        [command.get_program()].into_iter().chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_returned_and_failure_is_a_sentence() {
        assert_eq!(output(Command::new("echo").arg("hi")).unwrap(), "hi\n");
        let error = output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "`sh -c echo broken >&2; exit 3` failed (exit status: 3): broken");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(
            error.to_string().starts_with("the program `no-such-program-here` is not installed"),
            "{error}"
        );
    }
}

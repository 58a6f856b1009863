//! Becoming the container's program.

use std::ffi::CString;
use std::io;
use std::path::Path;

/// Gives signals the state a program expects at its birth: nothing blocked, everything at its default.
///
/// The Rust runtime ignores SIGPIPE, and an ignored signal survives `execve`.
pub fn reset_signals() -> io::Result<()> {
    // SAFETY: the set is initialised by sigemptyset before it is read; sigprocmask and signal have no other
    // preconditions, and SIG_DFL installs no handler of ours.
    unsafe {
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        if libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        for number in 1..=libc::SIGRTMAX() {
            // KILL, STOP and the two signals the C library keeps for itself answer EINVAL; they are at their default.
            libc::signal(number, libc::SIG_DFL);
        }
    }
    Ok(())
}

/// Replaces this process by a program, with exactly these arguments and environment, in this order.
///
/// Returns only when that failed.
pub fn execute(program: &Path, arguments: &[String], environment: &[String]) -> io::Error {
    match try_execute(program, arguments, environment) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_execute(
    program: &Path,
    arguments: &[String],
    environment: &[String],
) -> io::Result<std::convert::Infallible> {
    use std::os::unix::ffi::OsStrExt;
    let program = CString::new(program.as_os_str().as_bytes())?;
    let arguments = c_strings(arguments)?;
    let environment = c_strings(environment)?;
    let argument_pointers = pointers(&arguments);
    let environment_pointers = pointers(&environment);
    // SAFETY: all three point to NUL-terminated strings, the two arrays end in a null pointer, and everything they point
    // to lives until the call returns or this process image is gone.
    unsafe {
        libc::execve(program.as_ptr(), argument_pointers.as_ptr(), environment_pointers.as_ptr());
    }
    Err(io::Error::last_os_error())
}

fn c_strings(strings: &[String]) -> io::Result<Vec<CString>> {
    Ok(strings.iter().map(|string| CString::new(string.as_bytes())).collect::<Result<_, _>>()?)
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

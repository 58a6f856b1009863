//! A process's standard streams: pipes or a terminal, both ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use guest_runtime::shim::{ConsoleSize, Stdin, socket};
use rustix::fs::{Gid, Uid, fchown};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::tcsetwinsize;

use crate::program::window;

/// Room in an output pipe: fewer and larger reads under load. The kernel's default is 64 KiB.
const PIPE_LEN: usize = 256 * 1024;
const CONSOLE_SOCKET: &str = "console.sock";

/// The shim's ends of a process's standard streams. With a terminal all are its master.
#[derive(Debug, Default)]
pub struct Streams {
    pub stdin: Option<OwnedFd>,
    pub outputs: [Option<OwnedFd>; 2],
    pub terminal: Option<OwnedFd>,
}

/// Both ends of a process's pipes.
pub struct Pipes {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub streams: Streams,
}

impl Pipes {
    pub fn new(stdin: Stdin, user: u32) -> io::Result<Self> {
        let (their_stdin, our_stdin) = match stdin {
            Stdin::None => (OwnedFd::from(File::open("/dev/null")?), None),
            Stdin::Open | Stdin::Once => {
                let (reader, writer) = pipe(user)?;
                (reader, Some(writer))
            }
        };
        let (our_stdout, stdout) = pipe(user)?;
        let (our_stderr, stderr) = pipe(user)?;
        for end in our_stdin.iter().chain([&our_stdout, &our_stderr]) {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        let streams =
            Streams { stdin: our_stdin, outputs: [Some(our_stdout), Some(our_stderr)], terminal: None };
        Ok(Self { stdin: their_stdin, stdout, stderr, streams })
    }
}

/// A pipe that a process of this user may open again through `/dev/stdout`.
fn pipe(user: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // The default size is enough to work; a user with many pipes may be refused a larger one.
    let _ = fcntl_setpipe_size(&writer, PIPE_LEN);
    give(&writer, user)?;
    Ok((reader, writer))
}

fn give(descriptor: impl AsFd, user: u32) -> io::Result<()> {
    if user != 0 {
        fchown(descriptor, Some(Uid::from_raw(user)), None::<Gid>)?;
    }
    Ok(())
}

/// Where our ends come from.
pub enum Wiring {
    Pipes(Streams),
    Terminal(ConsoleSocket),
}

impl Wiring {
    /// Our ends, once the process has been made.
    pub fn take(self, user: u32, size: Option<ConsoleSize>) -> io::Result<Streams> {
        match self {
            Self::Pipes(streams) => Ok(streams),
            Self::Terminal(console) => console.accept(user, size),
        }
    }
}

/// Where the runtime sends a terminal's master. The next process with a terminal needs the name again.
pub struct ConsoleSocket {
    listener: UnixListener,
    /// Keeps `short` valid.
    _folder: File,
    short: PathBuf,
    path: PathBuf,
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Already gone when the runtime's folder is.
        let _ = fs::remove_file(&self.path);
    }
}

impl ConsoleSocket {
    /// Listens in a folder.
    pub fn listen(folder: &Path) -> io::Result<Self> {
        let listener = socket::bind(folder, CONSOLE_SOCKET)?;
        let open = File::open(folder)?;
        let own = rustix::process::getpid().as_raw_nonzero();
        let short = PathBuf::from(format!("/proc/{own}/fd/{}/{CONSOLE_SOCKET}", open.as_raw_fd()));
        Ok(Self { listener, _folder: open, short, path: folder.join(CONSOLE_SOCKET) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path of few bytes for other programs, valid as long as this lives: a socket's address has room for 107.
    pub fn short_path(&self) -> &Path {
        &self.short
    }

    pub fn accept(&self, user: u32, size: Option<ConsoleSize>) -> io::Result<Streams> {
        // The runtime connected and sent before it reported success: neither call waits.
        self.listener.set_nonblocking(true)?;
        let (connection, _) = self.listener.accept()?;
        terminal_streams(&connection, user, size)
    }
}

/// Our ends, from the terminal that comes through a connection.
pub fn terminal_streams(
    connection: &UnixStream,
    user: u32,
    size: Option<ConsoleSize>,
) -> io::Result<Streams> {
    let master = receive_descriptor(connection)?;
    if let Some(size) = size {
        tcsetwinsize(&master, window(size))?;
    }
    give(ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?, user)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok(Streams {
        stdin: Some(master.try_clone()?),
        outputs: [Some(master.try_clone()?), None],
        terminal: Some(master),
    })
}

fn receive_descriptor(connection: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 256];
    recvmsg(connection, &mut [io::IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::other("the runtime sent no terminal"))
}

//! Changes that programs outside the machine make in folders that containers bind: repeated here, so that our kernel tells
//! who watches. How and why: `guest_protocol::changes`, and the decision on shared folders.
//!
//! One thread repeats; the host knows it by its number, and answers it without doing anything. It has the bound folders open,
//! which is what the host watches: a container starts when that is so, and hears of every change from its first moment on.
//! Another thread reads what the host sends. The first bound folder opens the stream, and it stays: before another one the
//! host waits for what may still be under way on this one. Files: `repeat` makes the events, `watchers` finds out who would
//! hear them.

mod repeat;
mod watchers;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use guest_protocol::changes::{self, BATCH_BYTES_MAX, Change, DONE};
use guest_protocol::{port, share};
use rustix::fs::{OFlags, ResolveFlags};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::oneshot;

use repeat::Repeater;
use watchers::Watchers;

/// How long the host may take to begin, and to take a byte of ours.
const HOST_TIME_MAX: Duration = Duration::from_secs(15);
/// How long a container waits until the host watches what it binds. Without that it is of use too.
const BIND_TIME_MAX: Duration = Duration::from_secs(5);

/// Dropped when the host watches a folder, or cannot.
type Followed = oneshot::Sender<()>;

/// What the repeating thread is told.
enum Order {
    Bind { container: String, source: PathBuf, followed: Followed },
    End { container: String },
    Batch { stream: Arc<Socket>, changes: Vec<Change> },
    Ended { stream: Arc<Socket> },
}

/// Tells the repeating thread what containers bind. Cheap to clone; the default one tells nobody.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    orders: Option<Sender<Order>>,
}

impl Changes {
    /// Starts the thread.
    pub fn start() -> io::Result<Self> {
        let (orders, queue) = mpsc::channel();
        let thread = Thread {
            orders: orders.clone(),
            bound: BTreeMap::new(),
            open: HashMap::new(),
            stream: None,
            host: None,
        };
        thread::Builder::new().name("changes".into()).spawn(move || thread.run(&queue))?;
        Ok(Self { orders: Some(orders) })
    }

    /// A container that starts has this bound, a path of the machine. Waits until changes in it are told.
    pub async fn bind(&self, container: &str, source: &Path) {
        let Some(wait) = self.note(container, source) else { return };
        if tokio::time::timeout(BIND_TIME_MAX, wait).await.is_err() {
            tracing::warn!(
                source = %source.display(),
                "the host does not watch a bound folder after {BIND_TIME_MAX:?}: the container starts, and may miss changes"
            );
        }
    }

    /// A container that runs already has this bound. Its changes are told soon.
    pub fn bound(&self, container: &str, source: &Path) {
        let _soon = self.note(container, source);
    }

    fn note(&self, container: &str, source: &Path) -> Option<oneshot::Receiver<()>> {
        let (followed, wait) = oneshot::channel();
        source.starts_with(share::MOUNT).then(|| {
            self.order(Order::Bind { container: container.to_owned(), source: source.to_owned(), followed });
            wait
        })
    }

    /// A container has ended.
    pub fn end(&self, container: &str) {
        self.order(Order::End { container: container.to_owned() });
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread ends with the process.
            let _told = orders.send(order);
        }
    }
}

/// The repeating thread.
struct Thread {
    orders: Sender<Order>,
    /// By container.
    bound: BTreeMap<String, BTreeSet<PathBuf>>,
    open: HashMap<PathBuf, File>,
    stream: Option<Arc<Socket>>,
    host: Option<Repeater>,
}

impl Thread {
    fn run(mut self, queue: &Receiver<Order>) {
        while let Ok(order) = queue.recv() {
            match order {
                Order::Bind { container, source, followed } => {
                    self.bound.entry(container).or_default().insert(source);
                    self.follow();
                    drop(followed);
                }
                Order::End { container } => {
                    if self.bound.remove(&container).is_some() {
                        self.follow();
                    }
                }
                Order::Batch { stream, changes } => self.repeat(&stream, &changes),
                Order::Ended { stream } => {
                    if self.stream.as_ref().is_some_and(|current| Arc::ptr_eq(current, &stream)) {
                        tracing::info!("the host tells no more what changes in shared folders");
                        self.forget();
                    }
                }
            }
        }
    }

    fn forget(&mut self) {
        self.open.clear();
        if let Some(stream) = self.stream.take() {
            // The reader ends by it, if it has not ended already.
            let _ended = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Has open what is bound, and nothing else.
    fn follow(&mut self) {
        let wanted: BTreeSet<&PathBuf> = self.bound.values().flatten().collect();
        self.open.retain(|path, _| wanted.contains(path));
        let missing: Vec<PathBuf> =
            wanted.into_iter().filter(|path| !self.open.contains_key(*path)).cloned().collect();
        if self.stream.is_none()
            && !missing.is_empty()
            && let Err(error) = self.connect()
        {
            tracing::warn!(%error, "the host does not tell what changes in shared folders");
            return;
        }
        let Some(host) = &self.host else { return };
        for path in missing {
            match open(host.base(), &path) {
                Ok(folder) => drop(self.open.insert(path, folder)),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "changes in a bound folder are not told");
                }
            }
        }
    }

    fn connect(&mut self) -> io::Result<()> {
        let host = Repeater::new(Path::new(share::MOUNT))?;
        let stream = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        stream.connect(&SockAddr::vsock(port::HOST_CID, port::CHANGES))?;
        let thread = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or_default();
        begin(&stream, thread, HOST_TIME_MAX)?;
        let (stream, orders) = (Arc::new(stream), self.orders.clone());
        let reader = Arc::clone(&stream);
        thread::Builder::new().name("changes-in".into()).spawn(move || read(reader, &orders))?;
        (self.stream, self.host) = (Some(stream), Some(host));
        Ok(())
    }

    fn repeat(&mut self, stream: &Arc<Socket>, changes: &[Change]) {
        let Some(host) = &self.host else { return };
        if !self.stream.as_ref().is_some_and(|current| Arc::ptr_eq(current, stream)) {
            return;
        }
        let watchers = Watchers::find(Path::new("/proc"), host.device());
        for (index, change) in changes.iter().enumerate().filter(|(_, change)| watchers.hear(change)) {
            if let Err(error) = host.repeat(index, change) {
                // It changed again since, and that is told next.
                tracing::debug!(?change, %error, "a change on the host is not repeated");
            }
        }
        if let Err(error) = (&**stream).write_all(&[DONE]) {
            tracing::debug!(%error, "the host does not hear that changes were repeated");
        }
    }
}

/// Says hello to the host, which may take so long for each step, and hears that it knows `thread` from now on.
fn begin(mut stream: &Socket, thread: u32, limit: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(&changes::hello(thread))?;
    let first = receive(stream).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, format!("the host said nothing for {limit:?}"))
        }
        _ => error,
    })?;
    // The empty batch.
    if first.is_none_or(|changes| !changes.is_empty()) {
        return Err(io::Error::other("the host does not begin as it should"));
    }
    stream.write_all(&[DONE])?;
    // Between two changes there may be any time.
    stream.set_read_timeout(None)
}

/// Opens a bound folder, or the one that a bound file is in. Links are not followed.
fn open(base: &OwnedFd, path: &Path) -> io::Result<File> {
    let below = path.strip_prefix(share::MOUNT).map_err(io::Error::other)?;
    let folder = |path: &Path| repeat::open_below(base, path, OFlags::RDONLY | OFlags::DIRECTORY);
    match folder(below) {
        Err(rustix::io::Errno::NOTDIR) => {
            let around = below.parent().filter(|around| *around != Path::new(""));
            Ok(folder(around.ok_or(rustix::io::Errno::NOTDIR)?)?.into())
        }
        result => Ok(result?.into()),
    }
}

/// Nothing outside the share, whatever is made of the path meanwhile.
const WITHIN: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_XDEV);

/// Reads batches until the host hangs up.
fn read(stream: Arc<Socket>, orders: &Sender<Order>) {
    loop {
        let order = match receive(&stream) {
            Ok(Some(changes)) => Order::Batch { stream: Arc::clone(&stream), changes },
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "the stream of changes in shared folders ends");
                break;
            }
        };
        if orders.send(order).is_err() {
            return;
        }
    }
    let _told = orders.send(Order::Ended { stream });
}

/// One batch; `None` when the host has hung up.
fn receive(mut stream: &Socket) -> io::Result<Option<Vec<Change>>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > BATCH_BYTES_MAX {
        return Err(io::Error::other(format!("a batch of {length} bytes")));
    }
    let mut batch = vec![0; length];
    stream.read_exact(&mut batch)?;
    changes::decode(&batch).map(Some).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Socket, Socket) {
        Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_waits_until_what_it_binds_is_followed() {
        let (orders, queue) = mpsc::channel();
        let changes = Changes { orders: Some(orders) };
        let source = Path::new(share::MOUNT).join("home/src");
        let mut bind = std::pin::pin!(changes.bind("c", &source));
        assert!(tokio::time::timeout(BIND_TIME_MAX / 2, &mut bind).await.is_err(), "nobody follows it yet");
        drop(queue.recv().unwrap());
        bind.await;
        // A thread that has no answer keeps no container from starting.
        changes.bind("c", &source).await;
        let Order::Bind { followed, .. } = queue.recv().unwrap() else { panic!("another order") };
        assert!(followed.is_closed());
        // What is the machine's own is not the thread's business.
        changes.bind("c", Path::new("/var/lib/x")).await;
        assert!(queue.try_recv().is_err());
    }

    #[test]
    fn a_host_that_never_answers_is_given_up() {
        let (ours, host) = pair();
        let error = begin(&ours, 7, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert_eq!(error.to_string(), "the host said nothing for 50ms");
        let mut hello = [0; 4];
        (&host).read_exact(&mut hello).unwrap();
        assert_eq!(hello, changes::hello(7));
    }

    #[test]
    fn a_host_that_begins_may_then_be_silent_for_ever() {
        let (ours, host) = pair();
        (&host).write_all(&[0; 4]).unwrap();
        begin(&ours, 7, Duration::from_secs(60)).unwrap();
        assert_eq!(ours.read_timeout().unwrap(), None);
        assert_eq!(ours.write_timeout().unwrap(), Some(Duration::from_secs(60)));
        let mut heard = [0; 5];
        (&host).read_exact(&mut heard).unwrap();
        assert_eq!(heard.last(), Some(&DONE));
    }

    #[test]
    fn a_host_that_hangs_up_or_begins_with_changes_is_refused() {
        let (ours, host) = pair();
        drop(host);
        assert!(begin(&ours, 7, Duration::from_secs(60)).is_err());
        let (ours, host) = pair();
        (&host).write_all(&(BATCH_BYTES_MAX as u32 + 1).to_le_bytes()).unwrap();
        assert!(begin(&ours, 7, Duration::from_secs(60)).unwrap_err().to_string().contains("a batch of"));
    }
}

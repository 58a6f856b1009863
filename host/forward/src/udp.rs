//! One UDP port: datagrams of each peer on a stream of their own, and answers back.
//!
//! A *flow* is one peer. It lives for as long as datagrams come or go, and [`IDLE_MAX`] longer. Everything is bounded:
//! flows by [`FLOWS_MAX`], waiting datagrams of a flow by [`WAITING_MAX`]; what does not fit is dropped, as UDP may.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use guest_protocol::Transport;
use guest_protocol::forward::{DatagramDecoder, encode_datagram};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::forwarder::{Origin, Sink};

/// A flow in which nothing was said for this long is forgotten.
const IDLE_MAX: Duration = Duration::from_secs(90);
/// Flows of one port at a time. Beyond, the one that has been silent for longest ends.
const FLOWS_MAX: usize = 1024;
/// Datagrams of one flow that wait for the machine.
const WAITING_MAX: usize = 64;
/// No datagram is longer.
const DATAGRAM_BYTES_MAX: usize = 65_536;

struct Flow {
    datagrams: mpsc::Sender<Vec<u8>>,
    heard: Instant,
    task: tokio::task::AbortHandle,
}

/// Forwards for ever.
pub(crate) async fn forward(socket: UdpSocket, origin: Origin, sink: Sink) {
    let socket = Arc::new(socket);
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    // Dropped with this task, and all flows with it.
    let mut tasks: JoinSet<SocketAddr> = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        tokio::select! {
            ended = tasks.join_next(), if !tasks.is_empty() => {
                if let Some(Ok(peer)) = ended
                    && flows.get(&peer).is_some_and(|flow| flow.datagrams.is_closed())
                {
                    flows.remove(&peer);
                }
            }
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, peer)) => {
                    let datagram = buffer[..length].to_vec();
                    let Some(datagram) = deliver(&mut flows, peer, datagram) else { continue };
                    match open(&socket, &origin, peer, &sink) {
                        Ok((datagrams, flow)) => {
                            make_room(&mut flows);
                            // A fresh channel has room.
                            drop(datagrams.try_send(datagram));
                            let task = tasks.spawn(flow);
                            flows.insert(peer, Flow { datagrams, heard: Instant::now(), task });
                        }
                        Err(error) => warn!(%peer, %error, "a flow of datagrams cannot be forwarded"),
                    }
                }
                // An answer that found nobody comes back as an error of the next call.
                Err(error) => debug!(%error, "a datagram was lost"),
            },
        }
    }
}

/// Gives the datagram to its flow, or back if there is none.
fn deliver(flows: &mut HashMap<SocketAddr, Flow>, peer: SocketAddr, datagram: Vec<u8>) -> Option<Vec<u8>> {
    let Some(flow) = flows.get_mut(&peer) else { return Some(datagram) };
    flow.heard = Instant::now();
    match flow.datagrams.try_send(datagram) {
        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => None,
        Err(mpsc::error::TrySendError::Closed(datagram)) => Some(datagram),
    }
}

fn make_room(flows: &mut HashMap<SocketAddr, Flow>) {
    if flows.len() < FLOWS_MAX {
        return;
    }
    if let Some(peer) = flows.iter().min_by_key(|(_, flow)| flow.heard).map(|(peer, _)| *peer)
        && let Some(flow) = flows.remove(&peer)
    {
        flow.task.abort();
    }
}

/// Opens the stream of a new flow, and returns what its task does.
fn open(
    socket: &Arc<UdpSocket>,
    origin: &Origin,
    peer: SocketAddr,
    sink: &Sink,
) -> io::Result<(mpsc::Sender<Vec<u8>>, impl Future<Output = SocketAddr> + Send + 'static)> {
    let (near, far) = StdUnixStream::pair()?;
    near.set_nonblocking(true)?;
    let near = UnixStream::from_std(near)?;
    sink(origin.header(Transport::Udp, peer), far.into());
    let (datagrams, queue) = mpsc::channel(WAITING_MAX);
    let socket = Arc::clone(socket);
    let task = async move {
        if let Err(error) = carry(&socket, peer, near, queue).await {
            debug!(%peer, %error, "a flow of datagrams ended");
        }
        peer
    };
    Ok((datagrams, task))
}

/// Copies datagrams both ways until nothing has been said for [`IDLE_MAX`] or the machine hangs up.
async fn carry(
    socket: &UdpSocket,
    peer: SocketAddr,
    mut stream: UnixStream,
    mut queue: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    let mut decoder = DatagramDecoder::default();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut output = Vec::new();
    loop {
        tokio::select! {
            datagram = queue.recv(), if output.is_empty() => match datagram {
                // The kernel gives no longer ones.
                Some(datagram) => encode_datagram(&datagram, &mut output).map_err(io::Error::other)?,
                None => return Ok(()),
            },
            written = writer.write(&output), if !output.is_empty() => drop(output.drain(..written?)),
            count = reader.read(&mut buffer) => match count? {
                0 => return Ok(()),
                count => {
                    decoder.push(&buffer[..count]);
                    while let Some(datagram) = decoder.next_datagram() {
                        // A peer that has gone loses its answer, as on any network.
                        if let Err(error) = socket.send_to(datagram, peer).await {
                            debug!(%peer, %error, "an answer was lost");
                        }
                    }
                }
            },
            () = tokio::time::sleep(IDLE_MAX) => return Ok(()),
        }
    }
}

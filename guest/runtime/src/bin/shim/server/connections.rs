//! Clients: who comes, what they send, when they go.

use std::io::{self, Read};

use guest_runtime::shim::{ErrorKind, Reply, Request};
use rustix::event::PollFlags;

use super::{Server, ServerError};
use crate::client::{Attachment, Client, Mode};
use crate::report;

impl Server {
    pub(super) fn accept(&mut self) {
        let client = match self.listener.accept() {
            Ok((stream, _)) => Client::new(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => Err(error),
        };
        match client {
            Ok(client) => match self.clients.iter().position(Option::is_none) {
                Some(free) => self.clients[free] = Some(client),
                None => self.clients.push(Some(client)),
            },
            Err(error) => report(&ServerError::Io { step: "accept a connection", source: error }),
        }
    }

    pub(super) fn serve(&mut self, index: usize, flags: PollFlags) {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return };
        if flags.contains(PollFlags::OUT) && client.flush().is_err() {
            self.drop_client(index);
            return;
        }
        if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            client.hung_up = true;
        }
        if flags.contains(PollFlags::IN) {
            self.read_client(index);
        }
        let finished =
            self.clients[index].as_ref().is_some_and(|client| client.hung_up && !self.wants_input(client));
        // With input still to come but no room for it, wait for the process to make some.
        let blocked = self.clients[index].as_ref().is_some_and(|client| {
            client.attachment().is_some_and(|attachment| attachment.stdin && !client.ended)
        });
        if finished && !blocked {
            self.drop_client(index);
        }
    }

    fn read_client(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        let read = client.stream.read(&mut self.buffer);
        match read {
            Ok(0) => self.client_ended(index),
            Ok(count) => match client.attachment() {
                Some(Attachment { process, .. }) => {
                    if let Some(process) = self.processes.get_mut(process).and_then(Option::as_mut) {
                        process.feed(&self.buffer[..count]);
                    }
                }
                None => {
                    client.input.extend(&self.buffer[..count]);
                    self.serve_requests(index);
                }
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                self.client_ended(index);
                self.drop_client(index);
            }
        }
    }

    fn client_ended(&mut self, index: usize) {
        let Some(client) = self.clients[index].as_mut() else { return };
        client.ended = true;
        match client.mode {
            Mode::Attached(Attachment { process, stdin: true, .. }) => {
                if let Some(process) = self.process(process) {
                    process.feeder_left();
                }
            }
            // Replies already queued are still sent.
            Mode::Control => client.mode = Mode::Closing,
            _ => {}
        }
    }

    fn drop_client(&mut self, index: usize) {
        let Some(client) = self.clients[index].take() else { return };
        if let Some(attachment) = client.attachment()
            && attachment.stdin
            && !client.ended
            && let Some(process) = self.process(attachment.process)
        {
            process.feeder_left();
        }
        client.close();
    }

    pub(super) fn close_finished(&mut self) {
        for index in 0..self.clients.len() {
            // One that has hung up reads no more, whatever is queued.
            let finished = self.clients[index]
                .as_ref()
                .is_some_and(|one| one.mode == Mode::Closing && (one.queued() == 0 || one.hung_up));
            if finished {
                self.drop_client(index);
            }
        }
    }

    /// Answers the requests a client has sent, up to one that must wait.
    pub(super) fn serve_requests(&mut self, index: usize) {
        loop {
            let Some(client) = self.clients[index].as_mut() else { return };
            if client.mode != Mode::Control {
                return;
            }
            let request = match client.input.next_message::<Request>() {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(error) => {
                    self.answer(
                        index,
                        &Reply::Error { kind: ErrorKind::Other, message: crate::trace::chain(&error) },
                    );
                    if let Some(client) = self.clients[index].as_mut() {
                        client.mode = Mode::Closing;
                    }
                    return;
                }
            };
            match self.execute(index, request) {
                Ok(Some(reply)) => self.answer(index, &reply),
                Ok(None) => {}
                Err(refusal) => self.answer(index, &refusal.into()),
            }
        }
    }

    pub(super) fn answer(&mut self, index: usize, reply: &Reply) {
        let Some(client) = self.clients[index].as_mut() else { return };
        if let Err(error) = client.reply(reply) {
            report(&error);
            client.mode = Mode::Closing;
        }
    }
}

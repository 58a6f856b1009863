//! The writing side of a registry: uploads, mounts and manifests, kept in memory.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use guest_images::Digest;

use crate::server::{Answer, Request};

/// What was pushed. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Shelf(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    blobs: HashMap<String, Vec<u8>>,
    /// Repository and digest.
    owned: HashSet<(String, String)>,
    manifests: HashMap<String, (String, Vec<u8>)>,
    uploads: HashMap<String, Vec<u8>>,
    begun: usize,
}

fn full(status: u16, headers: &[(&str, String)], body: &[u8]) -> Answer {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    Answer::Full(status, headers, body.to_vec())
}

impl Shelf {
    /// For [`Server::start`](crate::server::Server::start).
    pub(crate) fn handler(&self) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
        let shelf = self.clone();
        move |request| shelf.answer(request)
    }

    /// The bytes and media type under `repository:tag`.
    pub(crate) fn manifest(&self, name: &str) -> Option<(String, Vec<u8>)> {
        let (repository, tag) = name.split_once(':').expect("repository:tag");
        self.0.lock().expect("shelf").manifests.get(&format!("/v2/{repository}/manifests/{tag}")).cloned()
    }

    pub(crate) fn blob(&self, digest: &str) -> Option<Vec<u8>> {
        self.0.lock().expect("shelf").blobs.get(digest).cloned()
    }

    pub(crate) fn answer(&self, request: &Request) -> Option<Answer> {
        let mut state = self.0.lock().expect("shelf");
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let asked = |name: &str| {
            let found = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            found.map(|value| value.replace("%3A", ":").replace("%2F", "/"))
        };
        let repository =
            path.strip_prefix("/v2/")?.split_once("/blobs/").map(|(repository, _)| repository.to_owned());
        match (request.method.as_str(), path) {
            ("PUT", path) if path.contains("/manifests/") => {
                let media_type = request.headers.get("content-type").cloned().unwrap_or_default();
                let digest = Digest::of(&request.body).to_string();
                let (start, _) = path.rsplit_once('/')?;
                for name in [path.to_owned(), format!("{start}/{digest}")] {
                    state.manifests.insert(name, (media_type.clone(), request.body.clone()));
                }
                Some(full(201, &[("docker-content-digest", digest)], b""))
            }
            ("GET" | "HEAD", path) if path.contains("/manifests/") => {
                let (media_type, bytes) = state.manifests.get(path)?;
                Some(Answer::ok(media_type, bytes))
            }
            ("POST", path) if path.ends_with("/blobs/uploads/") => {
                if let (Some(digest), Some(from)) = (asked("mount"), asked("from"))
                    && state.owned.contains(&(from, digest.clone()))
                {
                    state.owned.insert((repository?, digest));
                    return Some(full(201, &[], b""));
                }
                state.begun += 1;
                let location = format!("{path}{}", state.begun);
                state.uploads.insert(location.clone(), Vec::new());
                Some(full(202, &[("location", location)], b""))
            }
            ("PATCH", path) => {
                let range = request.headers.get("content-range").cloned().unwrap_or_default();
                let upload = state.uploads.get_mut(path)?;
                if range.split('-').next() != Some(upload.len().to_string().as_str()) {
                    return Some(full(416, &[], b""));
                }
                upload.extend_from_slice(&request.body);
                let range = format!("0-{}", upload.len().saturating_sub(1));
                Some(full(202, &[("location", path.to_owned()), ("range", range)], b""))
            }
            ("GET", path) if path.contains("/blobs/uploads/") => {
                let length = state.uploads.get(path)?.len();
                Some(full(
                    204,
                    &[("location", path.to_owned()), ("range", format!("0-{}", length.saturating_sub(1)))],
                    b"",
                ))
            }
            ("PUT", path) if path.contains("/blobs/uploads/") => {
                let mut upload = state.uploads.remove(path)?;
                upload.extend_from_slice(&request.body);
                let digest = Digest::of(&upload).to_string();
                if asked("digest") != Some(digest.clone()) {
                    return Some(Answer::status(
                        400,
                        r#"{"errors":[{"code":"DIGEST_INVALID","message":"not that"}]}"#,
                    ));
                }
                state.blobs.insert(digest.clone(), upload);
                state.owned.insert((repository?, digest));
                Some(full(201, &[], b""))
            }
            ("GET" | "HEAD", path) => {
                let (repository, digest) = (repository?, path.rsplit('/').next()?.to_owned());
                let blob = state
                    .blobs
                    .get(&digest)
                    .filter(|_| state.owned.contains(&(repository, digest.clone())))?;
                Some(Answer::ok("application/octet-stream", blob))
            }
            _ => None,
        }
    }
}

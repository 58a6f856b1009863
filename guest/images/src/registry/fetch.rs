//! Files of the web that are no registry's: the source of an import.

use std::io;

use futures_util::TryStreamExt;
use reqwest::Url;
use tokio::io::AsyncRead;
use tokio_util::io::StreamReader;

use super::{
    Registries,
    certificates::Certificates,
    client::{Trust, unreachable},
    insecure::is_local,
};
use crate::{Error, Images, Kind, Result};

impl Images {
    /// Begins to fetch a file (`http` or `https`; without a scheme, `http`). Answers the address as it is meant, and the
    /// bytes as they come.
    pub async fn fetch(&self, address: &str) -> Result<(String, impl AsyncRead + Send + Unpin + use<>)> {
        self.0.registries.fetch(address).await
    }
}

impl Registries {
    async fn fetch(&self, address: &str) -> Result<(String, impl AsyncRead + Send + Unpin + use<>)> {
        let text = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let url: Url = text
            .parse()
            .ok()
            .filter(|url: &Url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
            .ok_or_else(|| Error::invalid(format!("`{address}` is not an address that can be fetched")))?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let trust = Trust { checked: true, local: is_local(&host), certificates: Certificates::default() };
        let answer = self.clients.client(&trust, false)?.get(url.clone()).send().await;
        let answer = answer.map_err(|source| unreachable(&host, source))?;
        let status = answer.status();
        if !status.is_success() {
            let kind = if status.as_u16() == 404 { Kind::NotFound } else { Kind::Invalid };
            return Err(Error::new(kind, format!("failed to GET {url} with status {status}")));
        }
        let bytes = answer.bytes_stream().map_err(|source| io::Error::other(source.without_url()));
        Ok((url.to_string(), StreamReader::new(Box::pin(bytes))))
    }
}

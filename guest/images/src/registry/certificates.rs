//! What a person put into `certs.d/<host:port>` for one registry: authorities (`*.crt`) and a certificate to show there
//! (`NAME.cert` with its key `NAME.key`).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use crate::{Digest, Error, Result};

/// Bytes of one file at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A certificate with those that lead to its authority, and its key.
pub(super) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The files for one registry, as they are now.
#[derive(Clone, Default)]
pub(super) struct Certificates {
    authorities: Vec<(PathBuf, Vec<u8>)>,
    /// Certificate and key.
    own: Option<(PathBuf, Vec<u8>)>,
}

impl Certificates {
    /// Reads the folder of a registry; nothing when there is none. Blocks.
    pub(super) fn read(folder: &Path, domain: &str) -> Result<Self> {
        let mut found = Self::default();
        // A name of a registry has no slash, but it is not this function that made sure.
        if domain.contains('/') || domain.starts_with('.') {
            return Ok(found);
        }
        let folder = folder.join(domain);
        let listed = match fs::read_dir(&folder) {
            Err(source)
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                return Ok(found);
            }
            listed => listed.map_err(|source| Error::io("list", &folder, source))?,
        };
        let mut names = Vec::new();
        for entry in listed {
            let entry = entry.map_err(|source| Error::io("list", &folder, source))?;
            names.extend(entry.file_name().into_string().ok());
        }
        names.sort_unstable();
        for name in &names {
            if name.ends_with(".crt") {
                let path = folder.join(name);
                let bytes = bounded(&path)?;
                found.authorities.push((path, bytes));
            } else if let Some(stem) = name.strip_suffix(".cert") {
                let key = format!("{stem}.key");
                if !names.contains(&key) {
                    return Err(Error::invalid(format!(
                        "missing key {key} for client certificate {name} in `{}`. CA certificates must use the extension .crt",
                        folder.display()
                    )));
                }
                if found.own.is_none() {
                    let path = folder.join(name);
                    let mut bytes = bounded(&path)?;
                    bytes.push(b'\n');
                    bytes.extend(bounded(&folder.join(key))?);
                    found.own = Some((path, bytes));
                }
            } else if let Some(stem) = name.strip_suffix(".key")
                && !names.contains(&format!("{stem}.cert"))
            {
                return Err(Error::invalid(format!(
                    "missing client certificate {stem}.cert for key {name} in `{}`",
                    folder.display()
                )));
            }
        }
        Ok(found)
    }

    pub(super) fn has_authorities(&self) -> bool {
        !self.authorities.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.authorities.is_empty() && self.own.is_none()
    }

    /// Changes whenever a file does.
    pub(super) fn fingerprint(&self) -> Option<Digest> {
        if self.is_empty() {
            return None;
        }
        let parts =
            self.authorities.iter().chain(&self.own).flat_map(|(path, bytes)| {
                [Digest::of(path.as_os_str().as_encoded_bytes()), Digest::of(bytes)]
            });
        Some(Digest::of(parts.map(|digest| digest.to_string()).collect::<String>().as_bytes()))
    }

    pub(super) fn authorities(&self) -> Result<Vec<CertificateDer<'static>>> {
        let mut all = Vec::new();
        for (path, bytes) in &self.authorities {
            all.extend(certificates(path, bytes)?);
        }
        Ok(all)
    }

    /// The certificate to show, with what leads to its authority, and its key.
    pub(super) fn own(&self) -> Result<Option<Identity>> {
        let Some((path, bytes)) = &self.own else { return Ok(None) };
        let key = PrivateKeyDer::from_pem_slice(bytes).map_err(|source| unreadable(path, source))?;
        Ok(Some((certificates(path, bytes)?, key)))
    }

    /// The same, all in one text.
    pub(super) fn own_pem(&self) -> Option<&[u8]> {
        self.own.as_ref().map(|(_, bytes)| bytes.as_slice())
    }
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|source| unreadable(path, source))?;
    if found.is_empty() {
        return Err(Error::invalid(format!("`{}` holds no certificate in PEM form", path.display())));
    }
    Ok(found)
}

fn unreadable(path: &Path, source: pem::Error) -> Error {
    // The parser's words are about the file's form, never its content.
    Error::because(
        crate::Kind::Invalid,
        format!("`{}` is not a certificate (with its key) in PEM form", path.display()),
        source,
    )
}

fn bounded(path: &Path) -> Result<Vec<u8>> {
    let size = fs::metadata(path).map_err(|source| Error::io("look at", path, source))?.len();
    if size > FILE_BYTES_MAX {
        return Err(Error::invalid(format!("`{}` has {size} bytes: that is no certificate", path.display())));
    }
    fs::read(path).map_err(|source| Error::io("read", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_without_its_certificate_is_a_sentence() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Certificates::read(folder.path(), "r:5000").expect("nothing there").is_empty());
        let own = folder.path().join("r:5000");
        fs::create_dir(&own).expect("a folder");
        fs::write(own.join("client.cert"), "x").expect("write");
        let said = |folder: &Path| Certificates::read(folder, "r:5000").err().expect("refused").to_string();
        assert!(said(folder.path()).starts_with("missing key client.key for client certificate client.cert"));
        fs::write(own.join("client.key"), "x").expect("write");
        let found = Certificates::read(folder.path(), "r:5000").expect("both");
        assert!(found.own().expect_err("no PEM").to_string().contains("client.cert"));
        fs::remove_file(own.join("client.cert")).expect("removed");
        assert!(said(folder.path()).starts_with("missing client certificate client.cert for key client.key"));
    }

    #[test]
    fn a_name_cannot_lead_out_of_the_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("x.key"), "x").expect("write");
        for domain in ["..", ".", "a/..", "../x"] {
            assert!(Certificates::read(folder.path(), domain).expect("nothing").is_empty(), "{domain}");
        }
    }
}

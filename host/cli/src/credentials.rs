//! Credentials for registries, from where the docker CLI keeps them: `config.json` in `~/.docker` (`DOCKER_CONFIG` moves it)
//! and the credential helpers that it names. They are read for each request and kept nowhere.

use crate::output::note;
use docker_credential::{CredentialRetrievalError as Failure, DockerCredential, get_credential_from_reader};
use guest_api::image::AuthConfig;
use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};

/// What the docker CLI keeps Docker Hub's credentials under.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// What helpers print when they know nothing of a registry.
const UNKNOWN_TO_HELPER: &str = "credentials not found";

/// The credentials kept for the registry of `image`; none is an answer. Those that cannot be read are told of and left out:
/// whether it goes without is for the registry to say.
pub(crate) async fn of_image(image: &str) -> AuthConfig {
    let Some(config) = config_file(|name| std::env::var_os(name)) else { return AuthConfig::default() };
    let registry = registry(image).to_owned();
    // A helper is a program that may ask the person.
    let kept = tokio::task::spawn_blocking(move || {
        let found = kept(&config, &registry);
        found.map_err(|why| format!("the credentials for {registry} in `{}` {why}", config.display()))
    });
    match kept.await {
        Ok(Ok(auth)) => auth,
        Ok(Err(why)) => {
            note(&format!("WARNING: {why}; going on without them"));
            AuthConfig::default()
        }
        Err(error) => {
            note(&format!("WARNING: reading the credentials failed: {error}; going on without them"));
            AuthConfig::default()
        }
    }
}

/// The docker CLI's settings: `$DOCKER_CONFIG/config.json`, else `$HOME/.docker/config.json`.
fn config_file(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = set("DOCKER_CONFIG").or_else(|| set("HOME").map(|home| home.join(".docker")))?;
    Some(folder.join("config.json"))
}

/// The key of an image's registry in the settings: its host and port, or Docker Hub's own.
fn registry(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => match host {
            "docker.io" | "index.docker.io" => DOCKER_HUB,
            host => host,
        },
        _ => DOCKER_HUB,
    }
}

fn kept(config: &Path, registry: &str) -> Result<AuthConfig, String> {
    let file = match File::open(config) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(AuthConfig::default()),
        file => file.map_err(|error| format!("cannot be read: {error}"))?,
    };
    let auth = AuthConfig { serveraddress: registry.to_owned(), ..AuthConfig::default() };
    match get_credential_from_reader(BufReader::new(file), registry) {
        Ok(DockerCredential::IdentityToken(identitytoken)) => Ok(AuthConfig { identitytoken, ..auth }),
        Ok(DockerCredential::UsernamePassword(username, password)) => {
            Ok(AuthConfig { username, password, ..auth })
        }
        Err(Failure::NoCredentialConfigured) => Ok(AuthConfig::default()),
        Err(Failure::HelperFailure { stdout, .. }) if stdout.contains(UNKNOWN_TO_HELPER) => {
            Ok(AuthConfig::default())
        }
        Err(Failure::HelperFailure { helper, stdout, stderr }) => {
            Err(format!("were refused by `{helper}`: {} {}", stdout.trim(), stderr.trim()))
        }
        Err(Failure::HelperCommunicationError) => {
            Err("need a credential helper that cannot be run: is `docker-credential-…` in the PATH?"
                .to_owned())
        }
        Err(error) => Err(format!("cannot be used: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_registry_of_a_name_is_docker_hub_unless_it_has_a_host() {
        for image in ["debian", "library/debian:12", "docker.io/library/debian", "index.docker.io/a/b"] {
            assert_eq!(registry(image), DOCKER_HUB, "{image}");
        }
        assert_eq!(registry("localhost/a"), "localhost");
        assert_eq!(registry("registry.example:5000/a/b@sha256:00"), "registry.example:5000");
    }

    #[test]
    fn docker_config_wins_over_the_home() {
        let both = |name: &str| Some(format!("/{name}").into());
        assert_eq!(config_file(both), Some("/DOCKER_CONFIG/config.json".into()));
        let home = |name: &str| (name == "HOME").then(|| "/me".into());
        assert_eq!(config_file(home), Some("/me/.docker/config.json".into()));
        assert_eq!(config_file(|_| None), None);
    }

    #[test]
    fn credentials_come_from_the_file_or_from_a_helper() {
        let folder = std::env::temp_dir().join(format!("host-cli-credentials-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let config = folder.join("config.json");
        assert_eq!(kept(&config, "r.example"), Ok(AuthConfig::default()), "no file, no credentials");
        // `ana:secret`, and a helper for another registry.
        let text = r#"{"auths":{"r.example":{"auth":"YW5hOnNlY3JldA=="},"https://index.docker.io/v1/":{"auth":"YW5hOmh1Yg=="}},
            "credHelpers":{"h.example":"nobody-wrote-this-helper"}}"#;
        std::fs::write(&config, text).unwrap();
        let ana = kept(&config, "r.example").unwrap();
        assert_eq!((ana.username.as_str(), ana.password.as_str()), ("ana", "secret"));
        assert_eq!(ana.serveraddress, "r.example");
        assert_eq!(kept(&config, DOCKER_HUB).unwrap().password, "hub");
        assert_eq!(kept(&config, "other.example"), Ok(AuthConfig::default()));
        let why = kept(&config, "h.example").unwrap_err();
        assert!(why.contains("cannot be run"), "{why}");
        std::fs::write(&config, "{").unwrap();
        assert!(kept(&config, "r.example").unwrap_err().contains("cannot be used"));
        std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

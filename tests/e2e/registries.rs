//! Registries, by the stock docker CLI: push, every tag, login, and refusals in dockerd's words.

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::path::Path;
use tests_harness::{Engine, Finished, IMAGE, Registry, Stage, wait_until};

crate::scenarios![
    a_pushed_image_comes_back,
    every_tag_is_pushed_and_pulled_at_once,
    a_registry_refuses_in_dockerds_words,
    a_login_is_checked,
    a_registry_is_shown_the_certificate_it_asks_for,
];

fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    let command = engine.docker(arguments).context(
        "there is no docker CLI on this computer: install one (`apt-get install docker.io` or newer) to run this check",
    )?;
    tests_harness::run(command)
}

fn a_pushed_image_comes_back(engine: &Engine) -> Result<()> {
    let (first, second) = (
        format!("{}/pushed/one:1", engine.registry_name()),
        format!("{}/pushed/two:1", engine.registry_name()),
    );
    // With a layer that no other scenario has pushed.
    docker(engine, &["run", "--name", "pushed", IMAGE, "touch", "/pushed"])?.ok()?;
    docker(engine, &["commit", "pushed", &first])?.ok()?;
    docker(engine, &["rm", "pushed"])?.ok()?;
    docker(engine, &["tag", &first, &second])?.ok()?;
    let said = docker(engine, &["push", &first])?.ok()?;
    ensure!(said.contains(": Preparing") && said.contains(": Pushed"), "{said}");
    let line = said.lines().last().unwrap_or_default();
    let digest = line
        .split_once("digest: ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .unwrap_or_default()
        .to_owned();
    ensure!(line.starts_with("1: digest: sha256:") && line.contains(" size: "), "{said}");
    let said = engine.engine(["push", &first])?;
    ensure!(said.code == 0 && said.stderr.contains("Layer already exists"), "{said:?}");
    let said = docker(engine, &["push", &second])?.ok()?;
    ensure!(said.contains("Mounted from pushed/one"), "{said}");
    let digests = docker(engine, &["inspect", "-f", "{{json .RepoDigests}}", &first])?.ok()?;
    let by_digest = format!("{}@{digest}", first.trim_end_matches(":1"));
    ensure!(digests.contains(&by_digest), "{digests}");
    docker(engine, &["rmi", &first, &second])?.ok()?;
    docker(engine, &["pull", "-q", &by_digest])?.ok()?;
    let said = docker(engine, &["run", "--rm", &by_digest, "echo", "back"])?.ok()?;
    ensure!(said == "back", "{said}");
    docker(engine, &["rmi", &by_digest])?.ok().map(drop)
}

fn every_tag_is_pushed_and_pulled_at_once(engine: &Engine) -> Result<()> {
    let repository = format!("{}/pushed/all", engine.registry_name());
    let names = ["a", "b"].map(|tag| format!("{repository}:{tag}"));
    for name in &names {
        docker(engine, &["tag", IMAGE, name])?.ok()?;
    }
    docker(engine, &["push", "-a", &repository])?.ok()?;
    docker(engine, &["rmi", &names[0], &names[1]])?.ok()?;
    let said = docker(engine, &["pull", "-a", &repository])?.ok()?;
    ensure!(
        said.contains("a: Pulling from pushed/all") && said.contains("b: Pulling from pushed/all"),
        "{said}"
    );
    let listed = docker(engine, &["images", "--format", "{{.Tag}}", &repository])?.ok()?;
    ensure!(listed.lines().count() == 2, "{listed}");
    docker(engine, &["rmi", &names[0], &names[1]])?.ok().map(drop)
}

fn a_registry_refuses_in_dockerds_words(engine: &Engine) -> Result<()> {
    let name = format!("{}/pushed/nothing", engine.registry_name());
    docker(engine, &["pull", &format!("{name}:1")])?.fails_with(
        1,
        &format!(
            "Error response from daemon: manifest for {name}:1 not found: manifest unknown: manifest unknown"
        ),
    )?;
    docker(engine, &["push", &format!("{name}:1")])?
        .fails_with(1, &format!("An image does not exist locally with the tag: {name}"))?;
    docker(engine, &["tag", IMAGE, &format!("{name}:2")])?.ok()?;
    docker(engine, &["push", &format!("{name}:1")])?
        .fails_with(1, &format!("tag does not exist: {name}:1"))?;
    docker(engine, &["rmi", &format!("{name}:2")])?.ok()?;
    docker(engine, &["pull", "scratch"])?.fails_with(1, "'scratch' is a reserved name")?;
    docker(engine, &["pull", "--platform", "foobar", IMAGE])?.fails_with(1, "invalid platform")?;
    docker(engine, &["search", "--limit", "1000", "busybox"])?
        .fails_with(1, "limit 1000 is outside the range of [1, 100]")
        .map(drop)
}

fn a_login_is_checked(engine: &Engine) -> Result<()> {
    let config = engine.path("docker-config");
    std::fs::create_dir_all(&config)?;
    let config = config.to_str().context("a path that is text")?.to_owned();
    // This registry lets everybody in; one that does not answer lets nobody.
    let login = |registry: &str| {
        docker(engine, &["--config", &config, "login", "-u", "ana", "-p", "secret-of-ana", registry])
    };
    let said = login(&engine.registry_name())?.ok()?;
    ensure!(said.contains("Login Succeeded"), "{said}");
    let refused = login("127.0.0.1:1")?;
    ensure!(refused.code == 1 && refused.stderr.contains("cannot be reached"), "{refused:?}");
    ensure!(!engine.logs().contains("secret-of-ana"), "the password is in a log");
    std::fs::remove_dir_all(config)?;
    Ok(())
}

/// Who signs the certificates of a registry and of its client.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let root = authority.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(authority, key), root })
    }

    fn signed(&self, name: &str) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Starts a registry of this name, which wants to see a client's certificate.
    pub(crate) fn registry(&self, engine: &Engine, name: &str) -> Result<Registry> {
        let (certificate, key) = self.signed(name)?;
        let files = ["registry.crt", "registry.key", "clients.crt"].map(|name| engine.path(name));
        for (file, text) in files.iter().zip([&certificate, &key, &self.root]) {
            std::fs::write(file, text)?;
        }
        Registry::start_secure(&files[0], &files[1], &files[2])
    }

    /// Puts what a client of the registry needs into the registry's folder.
    pub(crate) fn show_client(&self, folder: &Path) -> Result<()> {
        let (certificate, key) = self.signed("client")?;
        for (file, text) in [("ca.crt", &self.root), ("client.cert", &certificate), ("client.key", &key)] {
            std::fs::write(folder.join(file), text)?;
        }
        Ok(())
    }
}

/// Through the machine; natively the folder is the same, and what is in it has tests of its own.
fn a_registry_is_shown_the_certificate_it_asks_for(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let host = engine.outside_address();
    let authority = Authority::new()?;
    let registry = authority.registry(engine, host)?;
    let domain = format!("{host}:{}", registry.port());
    let name = format!("{domain}/secure:1");
    docker(engine, &["tag", IMAGE, &name])?.ok()?;
    let refused = docker(engine, &["push", &name])?;
    ensure!(refused.code == 1 && refused.stderr.contains("cannot be reached"), "{refused:?}");
    // The machine runs, and sees them all the same; what it knows not to be there it looks for again after a second.
    let folder = engine.path("certs.d").join(&domain);
    std::fs::create_dir(&folder)?;
    authority.show_client(&folder)?;
    wait_until("the certificate is shown", || {
        Ok((docker(engine, &["push", "-q", &name])?.code == 0).then_some(()))
    })?;
    docker(engine, &["rmi", &name])?.ok()?;
    docker(engine, &["pull", "-q", &name])?.ok()?;
    docker(engine, &["rmi", &name])?.ok().map(drop)
}

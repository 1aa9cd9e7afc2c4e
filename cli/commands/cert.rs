//! `headwater cert`: an authority for a cluster, and what it signs for brokers and clients.
//!
//! Owns: the files. Nothing that is there is overwritten: a renewal says so, and replaces only a certificate of the same holder. A
//! file takes the place of another one whole, with its owner and its mode. A renewal that ends in the middle leaves a pair that can be used:
//! the key's file holds the old key and the new one while the certificate is replaced, and brokers and clients take the one that fits;
//! a second `--renew` leaves the rest out. Refuses: what stands in a certificate ([`headwater_broker::tls::make`]).

use anyhow::{Context, Result, bail};
use headwater_broker::tls::make::{Authority, Issued, MakeError, Validity, hosts_of};
use headwater_broker::tls::principal::{Holder, Name};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PROFILE_FILE, replace, write_aside};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::now_ms;
use crate::args::{BrokerCertArgs, CaArgs, CertCommand, ClientCertArgs, Global};
use crate::output::{note, print, print_json};

const CA_KEY_FILE: &str = "ca-key.pem";
const CLIENT_CERTIFICATE_FILE: &str = "client.pem";
const CLIENT_KEY_FILE: &str = "client-key.pem";

/// Where a broker is reached on its own machine.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Runs the command.
pub(crate) fn run(global: &Global, command: CertCommand) -> Result<()> {
    match command {
        CertCommand::Ca(args) => ca(global, args),
        CertCommand::Broker(args) => broker(global, args),
        CertCommand::Client(args) => client(global, args),
    }
}

/// What was made.
#[derive(Serialize)]
struct Made {
    kind: &'static str,
    uri: String,
    cluster: String,
    hosts: Vec<String>,
    certificate: String,
    key: String,
    ca: String,
    profile: Option<String>,
    not_after: i64,
    renewed: bool,
}

fn ca(global: &Global, args: CaArgs) -> Result<()> {
    let target = Target::new(&args.out, CA_FILE, CA_KEY_FILE);
    let at = target.certificate.display();
    let (cluster, before) = if args.renew {
        let cluster = load(&args.out)?.cluster().to_owned();
        if let Some(other) = args.cluster.filter(|other| *other != cluster) {
            bail!("{at} is the authority of cluster {cluster}, not of {other}: a renewal keeps the name");
        }
        (cluster, Some((read(&target.certificate)?, read(&target.key)?)))
    } else {
        if let Some(there) = [&target.certificate, &target.key].into_iter().find(|path| path.exists()) {
            bail!(
                "{} is there already, and nothing was written: what an authority signed is worthless without it. --renew \
                 keeps its key; another --out makes another authority",
                there.display()
            );
        }
        (args.cluster.unwrap_or_else(unique), None)
    };
    let key = before.as_ref().map(|(_, key)| key.as_str());
    let (_, issued) = Authority::make(&cluster, validity(args.validity), key)?;
    make_folder(&args.out)?;
    let mut trusted = issued.certificate_pem.clone();
    match &before {
        // The new one first: of several of one key that one counts.
        Some((old, _)) => trusted += old,
        None => write_aside(&target.key, issued.key_pem.as_bytes(), true)?,
    }
    put(&target.certificate, &trusted, false)?;
    tell(global, &target.made("ca", &issued, vec![], before.is_some())?)?;
    note(global, format_args!("keep {} off the brokers: whoever has it can be any of them", target.key.display()));
    Ok(())
}

fn broker(global: &Global, args: BrokerCertArgs) -> Result<()> {
    let authority = load(&args.ca)?;
    let target = Target::new(&args.out, CERTIFICATE_FILE, KEY_FILE);
    let before = target.before(&Name::new(authority.cluster(), Holder::Broker(args.id))?, args.renew)?;
    let mut hosts: Vec<String> = match &before {
        Some(before) if args.host.is_empty() => hosts_of(before)?,
        _ => args.host.iter().map(String::as_str).chain(LOCAL).map(str::to_owned).collect(),
    };
    let mut seen = HashSet::new();
    hosts.retain(|host| seen.insert(host.clone()));
    let issued = authority.broker(args.id, &hosts, validity(args.validity));
    let issued = issued.map_err(|error| explain(error, &authority))?;
    target.write(&args.ca, &issued)?;
    tell(global, &target.made("broker", &issued, hosts, before.is_some())?)?;
    let id = args.id;
    note(
        global,
        match before {
            Some(_) => "a broker that runs takes it without a restart, within tls.reload.interval.ms".to_owned(),
            None => format!(
                "broker {id} (its broker.id) shows it when the three files lie in its data folder, or its configuration names \
                 them: tls.certificate, tls.key and tls.ca"
            ),
        },
    );
    Ok(())
}

fn client(global: &Global, args: ClientCertArgs) -> Result<()> {
    let authority = load(&args.ca)?;
    let target = Target::new(&args.out, CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE);
    let before = target.before(&Name::new(authority.cluster(), Holder::Client(args.name.clone()))?, args.renew)?;
    let profile = Some(args.out.join(PROFILE_FILE)).filter(|_| !global.broker.is_empty());
    if let Some(there) = profile.as_ref().filter(|profile| profile.exists()) {
        bail!("{} is there already, and nothing was written: leave --broker out to keep it", there.display());
    }
    let issued = authority.client(&args.name, validity(args.validity));
    let issued = issued.map_err(|error| explain(error, &authority))?;
    target.write(&args.ca, &issued)?;
    let mut made = target.made("client", &issued, vec![], before.is_some())?;
    let (certificate, key) = (CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE);
    if let Some(profile) = &profile {
        let bootstrap = &global.broker;
        let text = format!(
            "# How this client reaches its cluster.\nbootstrap = {bootstrap:?}\nca = {CA_FILE:?}\ncertificate = {certificate:?}\nkey = {key:?}\n"
        );
        write_aside(profile, text.as_bytes(), false)?;
        made.profile = Some(profile.display().to_string());
    }
    tell(global, &made)?;
    note(
        global,
        match &made.profile {
            Some(profile) => format!("commands show it with --profile {profile}"),
            None => {
                format!("a client shows it when its profile says certificate = {certificate:?} and key = {key:?}")
            }
        },
    );
    Ok(())
}

/// Where the certificate of a broker or a client goes.
struct Target {
    certificate: PathBuf,
    key: PathBuf,
    /// What the holder trusts, beside them.
    ca: PathBuf,
}

impl Target {
    fn new(out: &Path, certificate: &str, key: &str) -> Target {
        Target { certificate: out.join(certificate), key: out.join(key), ca: out.join(CA_FILE) }
    }

    /// The certificate that is to be renewed, which must be this holder's; `None` where nothing is there, as it must be.
    fn before(&self, name: &Name, renew: bool) -> Result<Option<CertificateDer<'static>>> {
        if !renew {
            if let Some(there) = [&self.certificate, &self.key, &self.ca].into_iter().find(|path| path.exists()) {
                bail!(
                    "{} is there already, and nothing was written: --renew replaces a certificate by a new one of the same \
                     holder; another --out keeps both",
                    there.display()
                );
            }
            return Ok(None);
        }
        let at = self.certificate.display();
        let before = CertificateDer::from_pem_slice(read(&self.certificate)?.as_bytes());
        let before = before.with_context(|| format!("{at} cannot be renewed"))?;
        match Name::of(&before).with_context(|| format!("{at} cannot be renewed"))? {
            Some(of) if of == *name => Ok(Some(before)),
            Some(of) => bail!("{at} is the certificate of {of}, not of {name}, and was left as it is"),
            None => bail!("{at} names nobody, and was left as it is: make one without --renew, in another --out"),
        }
    }

    /// The authority is never taken from what the holder trusts already: while one takes over from another it trusts both.
    fn write(&self, authority: &Path, issued: &Issued) -> Result<()> {
        let authority = read(&authority.join(CA_FILE))?;
        let mut trusted = if self.ca.exists() { read(&self.ca)? } else { String::new() };
        let missing =
            certificates(&authority)?.iter().any(|one| !certificates(&trusted).is_ok_and(|all| all.contains(one)));
        if let Some(folder) = self.certificate.parent() {
            make_folder(folder)?;
        }
        if missing {
            trusted += &authority;
            put(&self.ca, &trusted, false)?;
        }
        if !self.key.exists() || !self.certificate.exists() {
            put(&self.key, &issued.key_pem, true)?;
            return put(&self.certificate, &issued.certificate_pem, false);
        }
        // At each moment one of the keys is the certificate's. Whoever takes the first key takes the old one for the old certificate.
        put(&self.key, &(read(&self.key)? + &issued.key_pem), true)?;
        put(&self.certificate, &issued.certificate_pem, false)?;
        put(&self.key, &issued.key_pem, true)
    }

    fn made(&self, kind: &'static str, issued: &Issued, hosts: Vec<String>, renewed: bool) -> Result<Made> {
        let certificate = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes())?;
        Ok(Made {
            kind,
            uri: issued.name.to_string(),
            cluster: issued.name.cluster.clone(),
            hosts,
            certificate: self.certificate.display().to_string(),
            key: self.key.display().to_string(),
            ca: self.ca.display().to_string(),
            profile: None,
            not_after: Validity::of(&certificate)?.not_after_s * 1_000,
            renewed,
        })
    }
}

fn tell(global: &Global, made: &Made) -> Result<()> {
    if global.json {
        return print_json(made);
    }
    if global.quiet {
        return Ok(());
    }
    let Made { uri, certificate, key, hosts, not_after, .. } = made;
    let reached = if hosts.is_empty() { String::new() } else { format!(", good for {}", hosts.join(", ")) };
    let until = jiff::Timestamp::from_millisecond(*not_after)?;
    let made = if made.renewed { "renewed" } else { "made" };
    print(format!("{made} {certificate} and {key}: {uri}{reached}, valid until {until}\n"))
}

fn load(folder: &Path) -> Result<Authority> {
    let (certificate, key) = (folder.join(CA_FILE), folder.join(CA_KEY_FILE));
    let missing = || format!("there is no authority in {}: `headwater cert ca --out DIR` makes one", folder.display());
    let (certificate, key) = (read(&certificate).with_context(missing)?, read(&key).with_context(missing)?);
    Authority::load(&certificate, &key).with_context(|| format!("the authority in {} cannot be used", folder.display()))
}

fn explain(error: MakeError, authority: &Authority) -> anyhow::Error {
    match error {
        MakeError::Outlives => {
            let end = jiff::Timestamp::from_second(authority.validity().not_after_s).unwrap_or(jiff::Timestamp::MAX);
            anyhow::anyhow!(
                "{error}, which ends at {end}, and nothing was written: choose a shorter --validity, or renew the authority with \
                 `headwater cert ca --out DIR --renew`"
            )
        }
        error => error.into(),
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    Ok(CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>()?)
}

fn validity(length: Duration) -> Validity {
    Validity::from_now(now_ms() / 1_000, length)
}

/// A cluster's name that nobody else has.
fn unique() -> String {
    format!("cluster-{:012x}", rand::random::<u64>() >> 16)
}

/// Writes a file whole. What it takes the place of hands its owner and its mode on; else it is for its owner alone where it is `private`.
fn put(path: &Path, text: &str, private: bool) -> Result<()> {
    Ok(if path.exists() { replace(path, text.as_bytes()) } else { write_aside(path, text.as_bytes(), private) }?)
}

fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

//! `headwater cert ...`: the certificates of a cluster.

use crate::spec;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum CertCommand {
    /// Makes a cluster's certificate authority: ca.pem and ca-key.pem.
    ///
    /// The key signs whoever may be a broker: keep it off the brokers. To move to a new authority without cutting anybody off, make one
    /// with the same --cluster in another folder; put both ca.pem, one after the other, in place of every broker's and
    /// client's; renew all certificates with the new one; then leave the old ca.pem out.
    Ca(CaArgs),
    /// Makes a broker's certificate: broker.pem, broker-key.pem and a copy of ca.pem.
    ///
    /// A broker finds them in its data folder, or where tls.certificate, tls.key and tls.ca say. Its certificate names it by a URI,
    /// headwater://CLUSTER/broker/ID: with it no broker can pose as another.
    Broker(BrokerCertArgs),
    /// Makes a client's certificate: client.pem, client-key.pem and a copy of ca.pem.
    ///
    /// Brokers know the client by headwater://CLUSTER/client/NAME. With --broker HOST:PORT a profile, client.toml, is written beside them.
    Client(ClientCertArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    /// The folder; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// The cluster's name: small letters, digits, points and hyphens. Without it: a name that nobody else has.
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// How long it is valid: 3650d, 10y, ...
    #[arg(long, value_name = "DURATION", default_value = "3650d", value_parser = spec::validity)]
    pub(crate) validity: Duration,
    /// A new certificate for the authority that is there: the same key, so that everything it signed stays good.
    #[arg(long)]
    pub(crate) renew: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BrokerCertArgs {
    /// The authority's folder, as `headwater cert ca --out` left it.
    #[arg(long, value_name = "DIR")]
    pub(crate) ca: PathBuf,
    /// The broker's id: broker.id of its configuration.
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) id: i32,
    /// DNS names and addresses by which clients reach it; localhost is added. May be left out with --renew: those of before.
    #[arg(long, value_name = "HOST", num_args = 1.., required_unless_present = "renew")]
    pub(crate) host: Vec<String>,
    /// The folder; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// How long it is valid: 365d, 48h, ... A broker takes a new one without a restart, so it need not be long.
    #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = spec::validity)]
    pub(crate) validity: Duration,
    /// Replaces the certificate and the key that are there; they must be this broker's.
    #[arg(long)]
    pub(crate) renew: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ClientCertArgs {
    /// The authority's folder, as `headwater cert ca --out` left it.
    #[arg(long, value_name = "DIR")]
    pub(crate) ca: PathBuf,
    /// The client's name: letters, digits and . _ @ + -
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    /// The folder; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// How long it is valid: 365d, 48h, ...
    #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = spec::validity)]
    pub(crate) validity: Duration,
    /// Replaces the certificate and the key that are there; they must be this client's.
    #[arg(long)]
    pub(crate) renew: bool,
}

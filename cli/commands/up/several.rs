//! `headwater up --brokers N`: a development cluster of processes on this machine.
//!
//! Each broker has a folder of its own under the command's, with its configuration, its certificate and its ports, which outlive
//! restarts. One authority signs them all, and its key is thrown away once it has. The brokers end with this command, be it killed:
//! each reads from a pipe that only this command holds open. One that is killed stays dead; whoever starts it again by its
//! configuration starts a process of his own.
//!
//! Owns: the folders and the processes. Refuses: what brokers do ([`headwater_broker`]).

use anyhow::{Context, Result, bail};
use headwater_broker::cluster;
use headwater_broker::config::BrokerConfig;
use headwater_broker::metadata::journal::JOURNAL_FILE;
use headwater_broker::tls::make::{Authority, Validity};
use headwater_broker::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PROFILE_FILE, write_aside};
use headwater_client::{Client, ClientConfig};
use serde::Serialize;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

use crate::args::{Global, UpArgs};
use crate::commands::now_ms;
use crate::logs;
use crate::output::{StdoutClosed, print, print_json};
use crate::signals::Signals;
use crate::spec::Setting;

/// A broker's configuration, in its folder.
const CONFIG_FILE: &str = "broker.toml";
/// Brokers that vote on the metadata, at most.
const MOST_VOTERS: u32 = 5;
/// Time for all of them to serve.
const READY: Duration = Duration::from_secs(60);
/// How often it is looked again whether they do.
const LOOK: Duration = Duration::from_millis(50);

/// What the first line says.
#[derive(Serialize)]
pub(in crate::commands) struct Ready {
    ready: bool,
    pub(in crate::commands) profile: String,
    brokers: Vec<ReadyBroker>,
}

#[derive(Serialize)]
struct ReadyBroker {
    id: u32,
    pid: u32,
    listen: String,
    admin: String,
    data: String,
}

/// A broker's process.
pub(in crate::commands) struct Process {
    id: u32,
    child: Child,
    /// While it is open, the broker runs.
    life: Option<ChildStdin>,
    served: Option<oneshot::Receiver<String>>,
}

impl Process {
    /// Kills it as a power cut would.
    pub(in crate::commands) fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill broker {}", self.id))?;
        self.child.wait()?;
        Ok(())
    }
}

/// The brokers: their folders, and their processes once they are started.
pub(in crate::commands) struct Brokers {
    data: PathBuf,
    settings: Vec<Setting>,
    /// Whether the folders were made by this start.
    is_new: bool,
    configs: Vec<(PathBuf, BrokerConfig)>,
    processes: Vec<Process>,
}

/// Runs the command.
pub(super) fn run(global: &Global, args: &UpArgs, brokers: u32) -> Result<()> {
    logs::start(global, "info", "human")?;
    std::fs::create_dir_all(&args.data).with_context(|| format!("cannot make {}", args.data.display()))?;
    let data = args.data.canonicalize().with_context(|| format!("cannot use {}", args.data.display()))?;
    if data.join(JOURNAL_FILE).exists() {
        bail!("{} is the folder of one broker: a cluster needs one of its own (--data DIR)", data.display());
    }
    let mut brokers = Brokers::configure(&data, &args.config, brokers)?;
    brokers.write()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let signals = Signals::catch();
        brokers.start().await?;
        let served = signals.unless_asked(brokers.serve()).await;
        let outcome = match served {
            None => Ok(()),
            Some(Err(error)) => Err(error),
            Some(Ok(ready)) => match announce(global, &ready, &data) {
                Err(error) if !error.is::<StdoutClosed>() => Err(error),
                _ => {
                    signals.asked().await;
                    Ok(())
                }
            },
        };
        brokers.end().await;
        outcome
    })
}

impl Brokers {
    /// The brokers' configurations: those that are there, with what this start says, or new ones.
    pub(in crate::commands) fn configure(data: &Path, settings: &[Setting], brokers: u32) -> Result<Brokers> {
        let folders: Vec<PathBuf> = (1..=brokers).map(|id| data.join(id.to_string())).collect();
        let there = folders.iter().filter(|folder| folder.join(CONFIG_FILE).exists()).count();
        let is_more = data.join((brokers + 1).to_string()).join(CONFIG_FILE).exists();
        if is_more || (there != 0 && there != folders.len()) {
            bail!("{} holds another number of brokers than {brokers}", data.display());
        }
        // All at once, so that none is given twice.
        let ports = (0..brokers).map(|_| Ok((UdpSocket::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?)));
        let ports: Vec<_> = ports.collect::<std::io::Result<_>>().context("there is no free port")?;
        let mut configs = Vec::new();
        for ((id, folder), (listen, admin)) in (1..=brokers).zip(&folders).zip(&ports) {
            let mut config = BrokerConfig::default();
            if there != 0 {
                config.apply_file(&folder.join(CONFIG_FILE))?;
            } else {
                (config.listen, config.admin) = (listen.local_addr()?, admin.local_addr()?);
            }
            (config.data_dir, config.broker_id) = (folder.clone(), id);
            configs.push((folder.join(CONFIG_FILE), config));
        }
        let (data, settings) = (data.to_owned(), settings.to_vec());
        Ok(Brokers { data, settings, is_new: there == 0, configs, processes: Vec::new() })
    }

    /// What the brokers are told, before it is written.
    pub(in crate::commands) fn configs_mut(&mut self) -> impl Iterator<Item = &mut BrokerConfig> {
        self.configs.iter_mut().map(|(_, config)| config)
    }

    /// Writes the configurations, and the certificates of a new cluster.
    pub(in crate::commands) fn write(&mut self) -> Result<()> {
        let servers: Vec<String> = self.configs.iter().map(|(_, config)| config.listen.to_string()).collect();
        let (servers, brokers) = (servers.join(","), self.configs.len());
        if self.is_new {
            let folders: Vec<PathBuf> = self.configs.iter().map(|(_, config)| config.data_dir.clone()).collect();
            sign(&self.data, &folders)?;
        }
        for (path, config) in &mut self.configs {
            let mut text = format!(
                "# A broker of `headwater up --brokers {brokers}`. Written at each start.\ndata.dir = {:?}\nbroker.id = {}\nlisten = \"{}\"\n\
                 admin.listen = \"{}\"\ncontroller.quorum.bootstrap.servers = \"{servers}\"\n",
                config.data_dir.display().to_string(),
                config.broker_id,
                config.listen,
                config.admin
            );
            if let Some(advertised) = &config.advertised_listener {
                text += &format!("advertised.listener = {advertised:?}\n");
            }
            config.set("up", "controller.quorum.bootstrap.servers", &servers)?;
            for setting in &self.settings {
                config.set("-c", &setting.key, &setting.value)?;
                text += &format!("{:?} = {:?}\n", setting.key, setting.value);
            }
            config.check()?;
            write_aside(path, text.as_bytes(), false)?;
        }
        let bootstrap: Vec<String> =
            self.configs.iter().map(|(_, config)| format!("{:?}", config.listen.to_string())).collect();
        let profile = format!(
            "# How a client reaches these brokers. Written at each start.\nbootstrap = [{}]\nca = {:?}\n",
            bootstrap.join(", "),
            self.data.join(CA_FILE).display().to_string()
        );
        write_aside(&self.data.join(PROFILE_FILE), profile.as_bytes(), false)?;
        Ok(())
    }

    /// Makes them one cluster, where they are none yet, and starts them.
    pub(in crate::commands) async fn start(&mut self) -> Result<()> {
        prepare(&self.configs).await?;
        for (path, config) in &self.configs {
            self.processes.push(start(path, config.broker_id)?);
        }
        Ok(())
    }

    /// A broker's process.
    pub(in crate::commands) fn process(&mut self, id: u32) -> Result<&mut Process> {
        let process = self.processes.iter_mut().find(|process| process.id == id);
        process.with_context(|| format!("there is no broker {id}"))
    }

    /// Starts a broker that has ended again.
    pub(in crate::commands) fn start_again(&mut self, id: u32) -> Result<()> {
        let config = self.configs.iter().find(|(_, config)| config.broker_id == id);
        let (path, _) = config.with_context(|| format!("there is no broker {id}"))?;
        let started = start(path, id)?;
        *self.process(id)? = started;
        Ok(())
    }

    /// Waits until all serve, a majority votes, and a controller has let all of them in.
    pub(in crate::commands) async fn serve(&mut self) -> Result<Ready> {
        serve(&self.data, &self.configs, &mut self.processes).await
    }

    /// Ends the brokers, and waits for them.
    pub(in crate::commands) async fn end(self) {
        end(self.processes).await;
    }
}

/// One authority, and a certificate for each broker.
fn sign(data: &Path, folders: &[PathBuf]) -> Result<()> {
    let now_s = now_ms() / 1000;
    // As long as anybody keeps a development cluster.
    let validity = Validity { not_before_s: now_s - 86_400, not_after_s: 4_859_740_800 };
    let name = format!("development-{:x}", rand::random::<u32>());
    let (authority, ca) = Authority::make(&name, validity, None)?;
    let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    for (id, folder) in (1..).zip(folders) {
        std::fs::create_dir_all(folder)?;
        let issued = authority.broker(id, &hosts, validity)?;
        write_aside(&folder.join(CA_FILE), ca.certificate_pem.as_bytes(), false)?;
        write_aside(&folder.join(CERTIFICATE_FILE), issued.certificate_pem.as_bytes(), false)?;
        write_aside(&folder.join(KEY_FILE), issued.key_pem.as_bytes(), true)?;
    }
    write_aside(&data.join(CA_FILE), ca.certificate_pem.as_bytes(), false)?;
    Ok(())
}

async fn prepare(configs: &[(PathBuf, BrokerConfig)]) -> Result<()> {
    let mut cluster_id = None;
    for (_, config) in configs {
        if config.data_dir.join(JOURNAL_FILE).exists() {
            continue;
        }
        let made = match &cluster_id {
            None if config.broker_id == 1 => cluster::init(config).await?,
            None => bail!("{} is new, and broker 1 is not: remove the folders, or join it", config.data_dir.display()),
            Some(cluster_id) => cluster::join_known(config, String::clone(cluster_id)).await?,
        };
        cluster_id = Some(made.cluster_id);
    }
    Ok(())
}

fn start(config: &Path, id: u32) -> Result<Process> {
    let mut command = Command::new(std::env::current_exe().context("this command cannot find itself")?);
    command.args(["broker", "--until-stdin-ends", "--json", "--config"]).arg(config);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start broker {id}"))?;
    let (tell, told) = oneshot::channel();
    let life = child.stdin.take();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            // An end without a line says that it did not start.
            if stdout.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                let _ = tell.send(line);
            }
            let _ = stdout.read_to_end(&mut Vec::new());
        });
    }
    Ok(Process { id, child, life, served: Some(told) })
}

async fn serve(data: &Path, configs: &[(PathBuf, BrokerConfig)], processes: &mut [Process]) -> Result<Ready> {
    let deadline = Instant::now() + READY;
    let mut brokers = Vec::new();
    for ((_, config), process) in configs.iter().zip(&mut *processes) {
        let Some(served) = process.served.take() else { continue };
        let served = tokio::time::timeout(deadline.saturating_duration_since(Instant::now()), served).await;
        if !matches!(served, Ok(Ok(_))) {
            bail!("broker {} does not serve: its log says why", process.id);
        }
        brokers.push(ReadyBroker {
            id: process.id,
            pid: process.child.id(),
            listen: config.listen.to_string(),
            admin: config.admin.to_string(),
            data: config.data_dir.display().to_string(),
        });
    }
    let profile = data.join(PROFILE_FILE);
    let client = Client::connect(ClientConfig::from_profile(&profile)?).await?;
    let admin = client.admin();
    let count = u32::try_from(configs.len()).unwrap_or(u32::MAX);
    // An even number of voters bears the loss of no more brokers than one less.
    let voters = count.min(MOST_VOTERS).saturating_sub(1) / 2 * 2 + 1;
    let told = admin.describe_cluster().await?;
    for id in (1..=voters).filter_map(|id| i32::try_from(id).ok()).filter(|id| !told.voters.contains(id)) {
        admin.change_voters(id, true).await.with_context(|| format!("cannot let broker {id} vote"))?;
    }
    loop {
        let told = admin.describe_cluster().await?;
        // One that is drained serves too.
        let active = told.brokers.iter().filter(|broker| broker.state != "fenced").count();
        if told.controller.is_some() && active >= configs.len() {
            break;
        }
        if Instant::now() >= deadline {
            bail!("{active} of {count} brokers are active, with controller {:?}", told.controller);
        }
        tokio::time::sleep(LOOK).await;
    }
    client.close().await;
    Ok(Ready { ready: true, profile: profile.display().to_string(), brokers })
}

async fn end(mut processes: Vec<Process>) {
    processes.iter_mut().for_each(|process| drop(process.life.take()));
    let ended = tokio::task::spawn_blocking(move || {
        for process in &mut processes {
            if let Err(error) = process.child.wait() {
                tracing::warn!(broker = process.id, %error, "the broker's end is not known");
            }
        }
    });
    drop(ended.await);
}

fn announce(global: &Global, ready: &Ready, data: &Path) -> Result<()> {
    if global.json {
        return print_json(ready);
    }
    let mut text =
        format!("{} brokers are up, with their data in {} (Ctrl-C ends them)\n", ready.brokers.len(), data.display());
    for broker in &ready.brokers {
        text += &format!(
            "  broker {} on {}, process {}, health at http://{}/health\n",
            broker.id, broker.listen, broker.pid, broker.admin
        );
    }
    if !global.quiet {
        text += &format!(
            "Other commands find them by their profile: headwater --profile {} cluster describe\n",
            ready.profile
        );
    }
    print(text)
}

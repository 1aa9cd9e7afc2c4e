//! The Headwater broker: sessions, partitions, groups, metadata, admin port.
//!
//! The way of a record: [`session`] takes the connection's streams; [`produce`] checks batches and hands them over;
//! [`partition`] decides and drives the log in `headwater_storage`; [`fetch`] sends it to readers.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use headwater_broker::{Broker, config::BrokerConfig};
//!
//! let config = BrokerConfig { data_dir: "headwater-data".into(), ..BrokerConfig::default() };
//! let broker = Broker::start(config).await?;
//! println!("serving on {}", broker.listen_addr());
//! broker.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod admin;
mod assignments;
mod call;
mod cleaner;
mod clock;
pub mod cluster;
mod cluster_calls;
mod cluster_metrics;
mod command_id;
pub mod config;
mod credit;
mod disk;
pub mod error;
mod fetch;
pub mod group;
mod import;
mod lease;
mod loan;
mod member;
pub mod metadata;
mod metrics;
mod os;
pub mod partition;
mod partitions;
pub mod peer;
pub mod planted;
mod pool;
mod produce;
pub mod quic;
pub mod replica;
mod rounds;
pub mod runtime;
mod sending;
mod server;
mod session;
mod shared;
mod start;
mod stream;
pub mod tls;
pub mod topic_config;
mod watch;

pub use error::StartError;
pub use start::Broker;

/// What this broker calls itself.
pub const SOFTWARE: &str = concat!("headwater/", env!("CARGO_PKG_VERSION"));

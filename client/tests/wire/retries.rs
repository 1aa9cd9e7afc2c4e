//! Between two attempts there is a pause, and the pauses grow.

use super::support::*;
use bytes::Bytes;
use headwater_client::{Client, ClientConfig, ErrorCode, ProducerRecord};
use headwater_proto::wire;
use std::time::{Duration, Instant};

/// As long as a test can wait for, and longer than anything else here takes.
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_millis(500);

/// Chance takes at most a half off a pause. Nothing is said of how long it may take: a machine may be busy.
#[tokio::test]
async fn a_producer_that_is_refused_pauses_before_it_tries_again_and_longer_each_time() {
    let mut peer = Peer::start(1).await;
    let config = ClientConfig { retry_backoff: FIRST, retry_backoff_max: LONGEST, ..peer.config() };
    let client = within("connect", Client::connect(config)).await.unwrap();
    let producer = within("build", client.producer().build()).await.unwrap();
    let delivery = producer.send(ProducerRecord::new(TOPIC, Bytes::from("one"))).await.unwrap();
    let mut told: Option<Instant> = None;
    for least in [Duration::ZERO, FIRST / 2, FIRST, LONGEST / 2, LONGEST / 2] {
        let mut stream = peer.stream().await;
        let pause = told.map_or(Duration::ZERO, |told| told.elapsed());
        assert!(pause >= least, "{pause:?} is less than {least:?}");
        told = Some(Instant::now());
        let error = wire::Error::new(ErrorCode::Overloaded, "come back later");
        stream.send(&wire::ProduceOpened { error: Some(error), ..nothing_yet() }, &[]).await;
    }
    let (mut stream, _) = peer.produce(1 << 20).await;
    let (request, _) = stream.append().await;
    stream.acknowledge(request.request_id, 7, false).await;
    assert_eq!(within("an acknowledgement", delivery).await.unwrap().offset, 7);
}

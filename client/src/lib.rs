//! The Headwater client: producer, consumer, consumer groups and administration over QUIC.

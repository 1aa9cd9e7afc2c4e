//! The client against a peer that says what the test tells it to: what it sends, and what it makes of the answers, loss
//! and refusals included, frame by frame.

#![allow(unreachable_pub)]

mod commits;
mod connect;
mod consumer;
mod coordinators;
mod group;
mod prefetch;
mod producer;
mod remembered;
mod retries;
mod support;
mod topics;
mod watch;

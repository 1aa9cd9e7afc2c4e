//! Any bytes as frames of every kind of stream, cut anywhere: nothing panics, the cuts change nothing, and no more is held
//! than was pushed.
//!
//! `cargo +nightly fuzz run frame`
#![no_main]

use bytes::Bytes;
use headwater_proto::frame::{FrameDecoder, FrameEvent};
use headwater_proto::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (step, data) = input;
    let data = Bytes::copy_from_slice(data);
    let step = usize::from(step).max(1);
    same_however_cut::<wire::Open>(&data, step);
    same_however_cut::<wire::Call>(&data, step);
    same_however_cut::<wire::CallResponse>(&data, step);
});

fn same_however_cut<M: prost::Message + Default + PartialEq>(data: &Bytes, step: usize) {
    assert!(frames::<M>(data, data.len().max(1)) == frames::<M>(data, step));
}

/// The messages and payloads that were found, and whether the end was an error.
fn frames<M: prost::Message + Default>(data: &Bytes, step: usize) -> (Vec<(M, Vec<u8>)>, bool) {
    let mut decoder = FrameDecoder::<M>::new(1 << 16, 1 << 16);
    let mut found: Vec<(M, Vec<u8>)> = Vec::new();
    for start in (0..data.len()).step_by(step) {
        decoder.push(data.slice(start..data.len().min(start + step)));
        loop {
            match decoder.next_event() {
                Ok(Some(FrameEvent::Header { message, .. })) => found.push((message, Vec::new())),
                Ok(Some(FrameEvent::Payload { part, .. })) => {
                    found.last_mut().expect("a header comes first").1.extend_from_slice(&part);
                }
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

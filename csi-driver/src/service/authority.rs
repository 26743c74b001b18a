//! Go programs that dial a bare socket path send it, percent-encoded, as the request's
//! `:authority` (`%2Fvar%2Flib…`). The HTTP/2 library below tonic takes that for a protocol error
//! and resets the stream before anybody sees the request. The stock kubelet registers plugins in
//! this way.
//!
//! This filter lies between socket and library and makes each `%` of an authority a `-`. Both have
//! codes of six bits in HPACK's Huffman code (RFC 7541, appendix B), so nothing changes its
//! length: neither frames nor the size of an entry in the peer's table. Everything else passes as
//! it came.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// "PRI * HTTP/2.0…", before the first frame (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;

/// Length, type, flags and stream of a frame (RFC 9113, 4.1).
const HEADER_BYTES: usize = 9;

/// Longest frame that is looked into: what a peer may send without asking.
const MAX_FRAME_BYTES: usize = 16_384;

const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Where in the stream of bytes we are.
#[derive(Debug)]
enum Place {
    /// In bytes that pass as they are, so many more.
    Passing(usize),
    /// In a frame's header, of which this has come.
    Header(Vec<u8>),
    /// In a HEADERS frame of this length, of which this has come, header included.
    Headers(Vec<u8>, usize),
}

/// Rewrites authorities in the bytes a client sends.
#[derive(Debug)]
pub(super) struct Filter {
    place: Place,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            place: Place::Passing(PREFACE_BYTES),
        }
    }
}

impl Filter {
    /// Takes bytes as they come, in any portions, and puts out those that are settled.
    pub(super) fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            match &mut self.place {
                Place::Passing(left) => {
                    let (now, later) = input.split_at(input.len().min(*left));
                    out.extend_from_slice(now);
                    input = later;
                    *left -= now.len();
                    if *left == 0 {
                        self.place = Place::Header(Vec::with_capacity(HEADER_BYTES));
                    }
                }
                Place::Header(header) => {
                    let (now, later) = input.split_at(input.len().min(HEADER_BYTES - header.len()));
                    header.extend_from_slice(now);
                    input = later;
                    if header.len() == HEADER_BYTES {
                        let header = std::mem::take(header);
                        self.place = after_header(header, out);
                    }
                }
                Place::Headers(frame, whole) => {
                    let (now, later) = input.split_at(input.len().min(*whole - frame.len()));
                    frame.extend_from_slice(now);
                    input = later;
                    if frame.len() == *whole {
                        rewrite_frame(frame);
                        out.append(frame);
                        self.place = Place::Header(Vec::with_capacity(HEADER_BYTES));
                    }
                }
            }
        }
    }
}

fn after_header(header: Vec<u8>, out: &mut Vec<u8>) -> Place {
    let length =
        usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
    if header[3] == HEADERS && (1..=MAX_FRAME_BYTES).contains(&length) {
        return Place::Headers(header, HEADER_BYTES + length);
    }
    out.extend_from_slice(&header);
    match length {
        0 => Place::Header(Vec::with_capacity(HEADER_BYTES)),
        length => Place::Passing(length),
    }
}

/// Rewrites the authority in a whole HEADERS frame. One that makes no sense stays as it is: the
/// library says what is wrong with it.
fn rewrite_frame(frame: &mut [u8]) {
    let flags = frame[4];
    let mut payload = &mut frame[HEADER_BYTES..];
    let mut padding = 0;
    if flags & PADDED != 0 {
        let Some((first, rest)) = payload.split_first_mut() else {
            return;
        };
        padding = usize::from(*first);
        payload = rest;
    }
    let skipped = if flags & PRIORITY != 0 { 5 } else { 0 };
    let Some(end) = payload.len().checked_sub(padding) else {
        return;
    };
    if let Some(block) = payload.get_mut(skipped..end) {
        let _ = rewrite_block(block);
    }
}

/// Walks through the fields of a header block (RFC 7541, 6). None when it ends too early.
fn rewrite_block(block: &mut [u8]) -> Option<()> {
    /// `:authority` in the static table.
    const AUTHORITY: usize = 1;
    let mut at = 0;
    while at < block.len() {
        let first = block[at];
        // How many bits of the first byte belong to the index, and whether strings follow.
        let (bits, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index = integer(block, &mut at, bits)?;
        if !literal {
            continue;
        }
        if index == 0 {
            string(block, &mut at)?;
        }
        let huffman = block.get(at)? & 0x80 != 0;
        let value = string(block, &mut at)?;
        if index == AUTHORITY {
            let value = block.get_mut(value)?;
            if huffman {
                rewrite_huffman(value);
            } else {
                value
                    .iter_mut()
                    .filter(|b| **b == b'%')
                    .for_each(|b| *b = b'-');
            }
        }
    }
    Some(())
}

/// A number with a prefix of so many bits (RFC 7541, 5.1).
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let most = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    // Four more bytes are more than any frame is long.
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Where the bytes of a string are (RFC 7541, 5.2).
fn string(block: &[u8], at: &mut usize) -> Option<std::ops::Range<usize>> {
    let length = integer(block, at, 7)?;
    let start = *at;
    let end = start
        .checked_add(length)
        .filter(|end| *end <= block.len())?;
    *at = end;
    Some(start..end)
}

/// Walks through codes of five to eight bits, which are all that a path is made of, and changes
/// `%` (0x15) to `-` (0x16). Stops at the first longer one, and at the padding.
fn rewrite_huffman(value: &mut [u8]) {
    const PERCENT: u32 = 0x15;
    let bits = value.len() * 8;
    let mut at = 0;
    while at < bits {
        // Beyond the end, padding: ones.
        let window = (0..8).fold(0_u32, |window, i| {
            let byte = value.get((at + i) / 8).copied().unwrap_or(0xff);
            window << 1 | u32::from(byte >> (7 - (at + i) % 8) & 1)
        });
        let length = match window {
            0x00..=0x4f => 5,
            0x50..=0xb7 => 6,
            0xb8..=0xf7 => 7,
            0xf8..=0xfd => 8,
            _ => return,
        };
        if length == 6 && window >> 2 == PERCENT {
            // 010101 becomes 010110.
            for bit in [at + 4, at + 5] {
                if let Some(byte) = value.get_mut(bit / 8) {
                    *byte ^= 1 << (7 - bit % 8);
                }
            }
        }
        at += length;
    }
}

/// A connection whose client may send any authority.
#[derive(Debug)]
pub(super) struct Tolerant<S> {
    inner: S,
    filter: Filter,
    settled: Vec<u8>,
    given: usize,
}

impl<S> Tolerant<S> {
    /// Wraps a new connection.
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            filter: Filter::default(),
            settled: Vec::new(),
            given: 0,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tolerant<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.given == this.settled.len() {
            let mut bytes = [0; 4096];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.settled.clear();
            this.given = 0;
            this.filter.feed(read.filled(), &mut this.settled);
        }
        let left = &this.settled[this.given..];
        let now = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..now]);
        this.given += now;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tolerant<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

impl<S> Connected for Tolerant<S> {
    type ConnectInfo = ();
    fn connect_info(&self) -> Self::ConnectInfo {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A HEADERS frame with this block.
    fn frame(block: &[u8]) -> Vec<u8> {
        let length = u8::try_from(block.len()).unwrap();
        let mut frame = vec![0, 0, length, HEADERS, 4, 0, 0, 0, 1];
        frame.extend_from_slice(block);
        frame
    }

    fn through(bytes: &[u8], portion: usize) -> Vec<u8> {
        let mut filter = Filter::default();
        let mut out = Vec::new();
        for part in bytes.chunks(portion) {
            filter.feed(part, &mut out);
        }
        out
    }

    fn stream(block: &[u8]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS, empty.
        bytes.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        bytes.extend(frame(block));
        bytes
    }

    /// `%2Fvar` in Huffman's code: % 010101, 2 00010, F 1100001, v 1110111, a 00011, r 101100,
    /// padded with ones.
    const ENCODED: [u8; 5] = [
        0b0101_0100,
        0b0101_1000,
        0b0111_1011,
        0b1000_1110,
        0b1100_1111,
    ];
    /// `-2Fvar`.
    const REPLACED: [u8; 5] = [
        0b0101_1000,
        0b0101_1000,
        0b0111_1011,
        0b1000_1110,
        0b1100_1111,
    ];

    #[test]
    fn a_percent_sign_in_an_authority_becomes_a_hyphen_in_any_portions() {
        // :method POST (indexed), :authority literal with indexing, raw and in Huffman's code.
        let mut block = vec![0x83, 0x41, 6];
        block.extend_from_slice(b"%2Fvar");
        block.extend_from_slice(&[0x41, 0x80 | 5]);
        block.extend_from_slice(&ENCODED);
        let mut expected = vec![0x83, 0x41, 6];
        expected.extend_from_slice(b"-2Fvar");
        expected.extend_from_slice(&[0x41, 0x80 | 5]);
        expected.extend_from_slice(&REPLACED);
        let bytes = stream(&block);
        for portion in 1..bytes.len() {
            assert_eq!(through(&bytes, portion), stream(&expected), "{portion}");
        }
    }

    #[test]
    fn other_fields_keep_their_percent_signs() {
        // :path literal without indexing, and a field with a name of its own.
        let block = [0x04, 2, b'/', b'%', 0x40, 1, b'%', 1, b'%'];
        let bytes = stream(&block);
        assert_eq!(through(&bytes, 7), bytes);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_pass_with_their_length_and_without_a_crash(
            bytes: Vec<u8>,
            portion in 1_usize..40,
        ) {
            let mut all = stream(&[]);
            all.extend_from_slice(&bytes);
            let out = through(&all, portion);
            assert!(out.len() <= all.len());
            assert_eq!(&out[..33], &all[..33]);
        }

        #[test]
        fn any_header_block_is_walked_without_a_crash(block: Vec<u8>) {
            let mut changed = block.clone();
            let _ = rewrite_block(&mut changed);
            assert_eq!(changed.len(), block.len());
        }
    }
}

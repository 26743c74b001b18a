//! Frames of SPDY/3.1, read from and written to bytes (draft-mbelshe-httpbis-spdy-00 §2). Pure;
//! no length a peer names is believed beyond the bounds here.

use super::headers::{Deflater, Headers, Inflater};

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 8;
/// Largest payload of a control frame. Those of kubectl have some hundred bytes.
pub const MAX_CONTROL: usize = 64 * 1024;
/// The only version there is a kubelet protocol for.
const VERSION: u16 = 3;
const CONTROL_BIT: u32 = 1 << 31;
/// Stream ids and window sizes have 31 bits.
const MASK_31: u32 = CONTROL_BIT - 1;
const FLAG_FIN: u8 = 1;
/// The setting that holds the initial window of streams.
const SETTING_INITIAL_WINDOW: u32 = 7;

/// Why bytes are no frame. The connection ends with any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another version.
    #[error("read a spdy frame: version {0} is not 3")]
    Version(u16),
    /// A control frame beyond [`MAX_CONTROL`].
    #[error("read a spdy frame: {0} bytes of control frame are too many")]
    TooLong(usize),
    /// A payload shorter than its kind has.
    #[error("read a spdy frame: a control frame of kind {0} is cut short")]
    Short(u16),
    /// Data for stream 0.
    #[error("read a spdy frame: stream 0 does not exist")]
    StreamZero,
    /// The headers cannot be decompressed or read.
    #[error("read a spdy frame: its header block is malformed")]
    HeaderBlock,
}

/// Why a stream is reset (§2.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetStatus {
    /// The peer broke the protocol.
    ProtocolError = 1,
    /// There is no such stream.
    InvalidStream = 2,
    /// Not begun, for want of room.
    RefusedStream = 3,
    /// Nobody wants it any more.
    Cancel = 5,
}

/// A frame's first eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Bytes of a stream follow.
    Data {
        /// Which stream.
        stream: u32,
        /// The last of this direction.
        fin: bool,
        /// Bytes that follow; the format allows 16 MiB.
        length: usize,
    },
    /// A payload to give to [`Control::parse`] follows.
    Control {
        /// Its number.
        kind: u16,
        /// Its flags.
        flags: u8,
        /// Bytes that follow, at most [`MAX_CONTROL`].
        length: usize,
    },
}

impl Head {
    /// Reads a head.
    ///
    /// # Errors
    /// [`FrameError`] when no good frame begins so.
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Result<Self, FrameError> {
        let [a, b, c, d, flags, l0, l1, l2] = bytes;
        let word = u32::from_be_bytes([a, b, c, d]);
        let length = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        if word & CONTROL_BIT == 0 {
            if word == 0 {
                return Err(FrameError::StreamZero);
            }
            let fin = flags & FLAG_FIN != 0;
            return Ok(Self::Data {
                stream: word,
                fin,
                length,
            });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::TooLong(length));
        }
        let kind = u16::from_be_bytes([c, d]);
        Ok(Self::Control {
            kind,
            flags,
            length,
        })
    }
}

/// The head of a data frame of `length` bytes (below 16 MiB).
pub fn data_head(stream: u32, fin: bool, length: usize) -> [u8; HEAD_BYTES] {
    head(stream & MASK_31, if fin { FLAG_FIN } else { 0 }, length)
}

fn head(word: u32, flags: u8, length: usize) -> [u8; HEAD_BYTES] {
    let [a, b, c, d] = word.to_be_bytes();
    let [_, l0, l1, l2] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [a, b, c, d, flags, l0, l1, l2]
}

/// A control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Opens a stream.
    SynStream {
        /// Its number: odd from clients, ever higher.
        stream: u32,
        /// The opener will send nothing.
        fin: bool,
        /// What it is.
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /// Which stream.
        stream: u32,
        /// The accepter will send nothing.
        fin: bool,
        /// Unused by the kubelet's protocols.
        headers: Headers,
    },
    /// Ends a stream in both directions at once.
    Reset {
        /// Which stream.
        stream: u32,
        /// A [`ResetStatus`], or whatever the peer says.
        status: u32,
    },
    /// Settings; only the initial window matters here.
    Settings {
        /// Bytes a stream may be ahead, when the peer says it.
        initial_window: Option<u32>,
    },
    /// To be sent back as it is.
    Ping(u32),
    /// No more streams will be taken.
    GoAway {
        /// The last stream taken.
        last: u32,
    },
    /// More headers of a stream.
    Headers {
        /// Which stream.
        stream: u32,
        /// The last of this direction.
        fin: bool,
    },
    /// More may be sent.
    Window {
        /// Which stream; 0 is the connection.
        stream: u32,
        /// Bytes.
        delta: u32,
    },
    /// A kind we do not know, to be passed over.
    Unknown(u16),
}

impl Control {
    /// Reads the payload of a control frame. Every frame with headers must come by here in its
    /// turn, as they share one compression.
    ///
    /// # Errors
    /// [`FrameError`] when it is malformed.
    pub fn parse(
        kind: u16,
        flags: u8,
        payload: &[u8],
        inflater: &mut Inflater,
    ) -> Result<Self, FrameError> {
        let word = |at: usize| {
            let bytes = payload.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_be_bytes).ok_or(FrameError::Short(kind))
        };
        let stream = || word(0).map(|id| id & MASK_31);
        let mut block = |from: usize| {
            let block = payload.get(from..).ok_or(FrameError::Short(kind))?;
            inflater.read(block)
        };
        let fin = flags & FLAG_FIN != 0;
        Ok(match kind {
            1 => Self::SynStream {
                stream: stream()?,
                fin,
                headers: block(10)?,
            },
            2 => Self::SynReply {
                stream: stream()?,
                fin,
                headers: block(4)?,
            },
            3 => Self::Reset {
                stream: stream()?,
                status: word(4)?,
            },
            4 => Self::Settings {
                initial_window: initial_window(payload).ok_or(FrameError::Short(kind))?,
            },
            6 => Self::Ping(word(0)?),
            7 => Self::GoAway { last: stream()? },
            8 => {
                let stream = stream()?;
                block(4)?;
                Self::Headers { stream, fin }
            }
            9 => Self::Window {
                stream: stream()?,
                delta: word(4)? & MASK_31,
            },
            other => Self::Unknown(other),
        })
    }

    /// Writes the whole frame.
    pub fn encode(&self, deflater: &mut Deflater) -> Vec<u8> {
        let fin_flag = |fin: bool| if fin { FLAG_FIN } else { 0 };
        let (kind, flags, payload) = match self {
            Self::SynStream {
                stream,
                fin,
                headers,
            } => {
                let mut payload = stream.to_be_bytes().to_vec();
                payload.extend_from_slice(&[0; 6]);
                payload.extend(deflater.write(headers));
                (1, fin_flag(*fin), payload)
            }
            Self::SynReply {
                stream,
                fin,
                headers,
            } => {
                let mut payload = stream.to_be_bytes().to_vec();
                payload.extend(deflater.write(headers));
                (2, fin_flag(*fin), payload)
            }
            Self::Reset { stream, status } => (3, 0, words(&[*stream, *status])),
            Self::Settings { initial_window } => {
                let payload = match initial_window {
                    Some(size) => words(&[1, SETTING_INITIAL_WINDOW, *size]),
                    None => words(&[0]),
                };
                (4, 0, payload)
            }
            Self::Ping(id) => (6, 0, words(&[*id])),
            Self::GoAway { last } => (7, 0, words(&[*last, 0])),
            Self::Headers { stream, fin } => {
                let mut payload = stream.to_be_bytes().to_vec();
                payload.extend(deflater.write(&Headers::default()));
                (8, fin_flag(*fin), payload)
            }
            Self::Window { stream, delta } => (9, 0, words(&[*stream, *delta])),
            Self::Unknown(kind) => (*kind, 0, Vec::new()),
        };
        let word = CONTROL_BIT | u32::from(VERSION) << 16 | u32::from(kind);
        let mut frame = head(word, flags, payload.len()).to_vec();
        frame.extend(payload);
        frame
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_be_bytes()).collect()
}

/// The initial window among the entries of a SETTINGS frame; none at all when it is cut short.
fn initial_window(payload: &[u8]) -> Option<Option<u32>> {
    let (count, rest) = payload.split_first_chunk()?;
    let count = usize::try_from(u32::from_be_bytes(*count)).ok()?;
    let entries = rest.get(..count.checked_mul(8)?)?;
    let mut found = None;
    for entry in entries.chunks_exact(8) {
        // One byte of flags before the number.
        let id = u32::from_be_bytes([0, entry[1], entry[2], entry[3]]);
        if id == SETTING_INITIAL_WINDOW {
            found = Some(u32::from_be_bytes([entry[4], entry[5], entry[6], entry[7]]) & MASK_31);
        }
    }
    Some(found)
}

/// Fuzz body: reads any bytes as a sequence of frames, and writes what was understood again.
/// Must never panic, whatever it is given.
pub fn exercise(mut bytes: &[u8]) {
    let (mut inflater, mut deflater) = (Inflater::default(), Deflater::default());
    while let Some((first, rest)) = bytes.split_first_chunk::<HEAD_BYTES>() {
        let length = match Head::parse(*first) {
            Ok(Head::Data { length, .. }) => length,
            Ok(Head::Control {
                kind,
                flags,
                length,
            }) => {
                let payload = rest.get(..length).unwrap_or(rest);
                match Control::parse(kind, flags, payload, &mut inflater) {
                    Ok(frame) => drop(frame.encode(&mut deflater)),
                    Err(_) => return,
                }
                length
            }
            Err(_) => return,
        };
        bytes = rest.get(length..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(frame: &[u8], inflater: &mut Inflater) -> Result<Control, FrameError> {
        let (head, payload) = frame.split_first_chunk().unwrap();
        let Head::Control {
            kind,
            flags,
            length,
        } = Head::parse(*head)?
        else {
            panic!("not a control frame");
        };
        assert_eq!(length, payload.len());
        Control::parse(kind, flags, payload, inflater)
    }

    #[test]
    fn every_control_frame_is_read_as_it_was_written() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let headers = Headers::new(&[("streamtype", "stdin")]);
        let (stream, fin) = (7, true);
        let frames = [
            Control::SynStream {
                stream,
                fin,
                headers: headers.clone(),
            },
            Control::SynReply {
                stream,
                fin: false,
                headers,
            },
            Control::Reset {
                stream,
                status: ResetStatus::Cancel as u32,
            },
            Control::Settings {
                initial_window: Some(1 << 20),
            },
            Control::Settings {
                initial_window: None,
            },
            Control::Ping(9),
            Control::GoAway { last: 7 },
            Control::Headers { stream, fin },
            Control::Window {
                stream: 0,
                delta: 65536,
            },
            Control::Unknown(77),
        ];
        for frame in frames {
            let bytes = frame.encode(&mut deflater);
            assert_eq!(read(&bytes, &mut inflater), Ok(frame));
        }
        assert_eq!(
            Head::parse(data_head(5, true, 300)),
            Ok(Head::Data {
                stream: 5,
                fin: true,
                length: 300
            })
        );
    }

    /// Bytes as the reference implementation of Kubernetes' clients sends them.
    #[test]
    fn heads_have_the_bits_of_the_draft() {
        let ping = Control::Ping(1).encode(&mut Deflater::default());
        assert_eq!(ping, [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
        assert_eq!(data_head(1, true, 2), [0, 0, 0, 1, 1, 0, 0, 2]);
    }

    #[test]
    fn what_breaks_the_bounds_is_named() {
        let wrong = |bytes| Head::parse(bytes).unwrap_err();
        assert_eq!(wrong([0x80, 2, 0, 6, 0, 0, 0, 4]), FrameError::Version(2));
        assert_eq!(
            wrong([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]),
            FrameError::TooLong(0xff_ffff)
        );
        assert_eq!(wrong([0; 8]), FrameError::StreamZero);
        // A SETTINGS frame that promises more entries than it has.
        let parsed = Control::parse(4, 0, &[0xff; 4], &mut Inflater::default());
        assert_eq!(parsed, Err(FrameError::Short(4)));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            exercise(&bytes);
        }

        #[test]
        fn garbage_behind_a_good_head_never_panics(
            frames in prop::collection::vec((0u16..11, any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..8)
        ) {
            let mut bytes = Vec::new();
            for (kind, flags, payload) in frames {
                let word = CONTROL_BIT | u32::from(VERSION) << 16 | u32::from(kind);
                bytes.extend(head(word, flags, payload.len()));
                bytes.extend(payload);
            }
            exercise(&bytes);
        }
    }
}

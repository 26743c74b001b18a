//! Header blocks: name/value pairs behind a zlib stream that lives as long as the connection
//! (draft-mbelshe-httpbis-spdy-00 §2.6.10). Pure but for the zlib state.

use super::dictionary::DICTIONARY;
use super::frame::FrameError;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Largest header block after decompression. kubectl sends some hundred bytes; the bound keeps a
/// small frame from growing into a large one.
const MAX_BLOCK: usize = 64 * 1024;

/// Pairs as received; names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// From pairs.
    pub fn new(pairs: &[(&str, &str)]) -> Self {
        let own = |(name, value): &(&str, &str)| (name.to_ascii_lowercase(), (*value).to_owned());
        Self(pairs.iter().map(own).collect())
    }

    /// The value of a name in any case; of several (separated by NUL) the first.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name))?;
        found.1.split('\0').next()
    }

    /// Reads a block in the clear.
    fn parse(mut block: &[u8]) -> Result<Self, FrameError> {
        let count = number(&mut block)?;
        let mut pairs = Vec::new();
        for _ in 0..count {
            // A lying count ends here: each pair takes at least eight bytes of a bounded block.
            let name = string(&mut block)?.to_ascii_lowercase();
            pairs.push((name, string(&mut block)?));
        }
        Ok(Self(pairs))
    }

    fn write(&self) -> Vec<u8> {
        let mut block = length(self.0.len()).to_vec();
        for (name, value) in &self.0 {
            for part in [name, value] {
                block.extend_from_slice(&length(part.len()));
                block.extend_from_slice(part.as_bytes());
            }
        }
        block
    }
}

fn length(count: usize) -> [u8; 4] {
    u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes()
}

fn number(block: &mut &[u8]) -> Result<u32, FrameError> {
    let (head, rest) = block.split_first_chunk().ok_or(FrameError::HeaderBlock)?;
    *block = rest;
    Ok(u32::from_be_bytes(*head))
}

fn string(block: &mut &[u8]) -> Result<String, FrameError> {
    let length = usize::try_from(number(block)?).map_err(|_| FrameError::HeaderBlock)?;
    let (text, rest) = block
        .split_at_checked(length)
        .ok_or(FrameError::HeaderBlock)?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Reads the header blocks of one direction, in order.
#[derive(Debug)]
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// Decompresses and reads one block.
    ///
    /// # Errors
    /// [`FrameError`] for anything that is no block; the connection cannot go on then, as later
    /// blocks refer to this one.
    pub fn read(&mut self, mut input: &[u8]) -> Result<Headers, FrameError> {
        let mut block = Vec::with_capacity(1024);
        loop {
            if block.len() == block.capacity() {
                if block.len() >= MAX_BLOCK {
                    return Err(FrameError::HeaderBlock);
                }
                block.reserve(block.len());
            }
            let (taken, given) = (self.0.total_in(), block.len());
            let outcome = self
                .0
                .decompress_vec(input, &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.0.total_in() - taken).unwrap_or(usize::MAX);
            input = input.get(used..).unwrap_or_default();
            match outcome {
                Ok(Status::Ok | Status::BufError) => {}
                // A stream that ends has no place for the next block.
                Ok(Status::StreamEnd) => return Err(FrameError::HeaderBlock),
                Err(e) => {
                    if e.needs_dictionary().is_none() || self.0.set_dictionary(DICTIONARY).is_err()
                    {
                        return Err(FrameError::HeaderBlock);
                    }
                    continue;
                }
            }
            if block.len() < block.capacity() {
                // There was room left: all of the input that can be decoded has been.
                let idle = used == 0 && block.len() == given;
                if input.is_empty() || idle {
                    return Headers::parse(&block);
                }
            }
        }
    }
}

/// Writes the header blocks of one direction, in order.
#[derive(Debug)]
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::best(), true);
        // Refused only in the middle of a stream, which this is not; without the dictionary the
        // blocks are longer, not wrong.
        let _ = compress.set_dictionary(DICTIONARY);
        Self(compress)
    }
}

impl Deflater {
    /// Compresses one block, up to a byte boundary.
    pub fn write(&mut self, headers: &Headers) -> Vec<u8> {
        let block = headers.write();
        let mut out = Vec::with_capacity(block.len() + 64);
        let mut input = block.as_slice();
        loop {
            let before = self.0.total_in();
            let outcome = self.0.compress_vec(input, &mut out, FlushCompress::Sync);
            let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            input = input.get(used..).unwrap_or_default();
            if outcome.is_err() || (input.is_empty() && out.len() < out.capacity()) {
                return out;
            }
            out.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_survive_compression_one_after_the_other() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let long = "x".repeat(5000);
        for pairs in [
            vec![("streamType", "error"), ("port", "80")],
            vec![],
            vec![("streamtype", "data"), ("port", "80"), ("long", &long)],
        ] {
            let headers = Headers::new(&pairs);
            let read = inflater.read(&deflater.write(&headers)).unwrap();
            assert_eq!(read, headers);
            for (name, value) in pairs {
                assert_eq!(read.get(name), Some(value));
            }
        }
    }

    #[test]
    fn the_dictionary_is_the_one_of_the_draft() {
        let mut compress = Compress::new(Compression::best(), true);
        assert_eq!(compress.set_dictionary(DICTIONARY).unwrap(), 0xe3c6_a7c2);
    }

    #[test]
    fn a_block_that_grows_without_bound_is_refused() {
        let bomb = Headers::new(&[("a", &"0".repeat(1 << 20))]);
        let small = Deflater::default().write(&bomb);
        assert!(small.len() < 4096);
        assert!(Inflater::default().read(&small).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(blocks: Vec<Vec<u8>>) {
            let mut inflater = Inflater::default();
            for block in blocks {
                let _ = Headers::parse(&block);
                let _ = inflater.read(&block);
            }
        }
    }
}

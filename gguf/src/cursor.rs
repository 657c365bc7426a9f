//! A bounds-checked reader over the mapped bytes. Every length is compared
//! with what is left before anything is allocated for it.

use crate::error::{Error, Result};
use crate::limits;
use byteorder::{ByteOrder, LittleEndian};

pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub fn offset(&self) -> u64 {
        self.at as u64
    }

    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes, or an error that names `what` wanted them.
    pub fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8]> {
        if n > self.left() {
            return Err(Error::Truncated { what, offset: self.offset(), needed: n, available: self.left() });
        }
        let start = self.at;
        self.at += n as usize;
        Ok(&self.bytes[start..self.at])
    }

    pub fn u8(&mut self, what: &'static str) -> Result<u8> {
        Ok(self.take(1, what)?[0])
    }

    pub fn u16(&mut self, what: &'static str) -> Result<u16> {
        Ok(LittleEndian::read_u16(self.take(2, what)?))
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32> {
        Ok(LittleEndian::read_u32(self.take(4, what)?))
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64> {
        Ok(LittleEndian::read_u64(self.take(8, what)?))
    }

    /// A count that must not exceed `limit`, and whose elements of at least
    /// `min_bytes` each must fit in what is left.
    pub fn count(&mut self, what: &'static str, limit: u64, min_bytes: u64) -> Result<u64> {
        let offset = self.offset();
        let n = self.u64(what)?;
        if n > limit {
            return Err(Error::Limit { what, offset, value: n, limit });
        }
        let needed = n * min_bytes; // n <= 2^24 and min_bytes <= 64, so this cannot overflow
        if needed > self.left() {
            return Err(Error::Truncated { what, offset, needed, available: self.left() });
        }
        Ok(n)
    }

    pub fn string(&mut self, what: &'static str, limit: u64) -> Result<String> {
        let offset = self.offset();
        let n = self.count(what, limit.min(limits::MAX_STRING), 1)?;
        let bytes = self.take(n, what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => Err(Error::NotUtf8 { what, offset }),
        }
    }
}

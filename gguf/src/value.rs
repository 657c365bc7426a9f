//! Metadata values: the thirteen GGUF value types, and the ordered key/value list.

use crate::cursor::Cursor;
use crate::error::{Error, Result};
use crate::limits;
use byteorder::{LittleEndian, WriteBytesExt};
use std::collections::HashMap;
use std::io::Write;

/// One metadata value. The ids are the format's: u8 0, i8 1, u16 2, i16 3,
/// u32 4, i32 5, f32 6, bool 7, string 8, array 9, u64 10, i64 11, f64 12.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A homogeneous array, stored unboxed: a vocabulary has 10^5 entries.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Reads `n` scalars whose bytes were already counted against the file's end.
macro_rules! scalars {
    ($cur:expr, $n:expr, $ty:ty) => {{
        const SIZE: usize = size_of::<$ty>();
        let bytes = $cur.take($n * SIZE as u64, "an array")?;
        bytes.chunks_exact(SIZE).map(|c| <$ty>::from_le_bytes(c.try_into().unwrap_or([0; SIZE]))).collect()
    }};
}

fn read_bool(cur: &mut Cursor) -> Result<bool> {
    let offset = cur.offset();
    match cur.u8("a boolean")? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(Error::BadBool { value, offset }),
    }
}

impl Array {
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn type_id(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::String(_) => 8,
            Array::Array(_) => 9,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }

    /// Element `i` widened to u64, for integer arrays (per-layer head counts).
    pub fn get_u64(&self, i: usize) -> Option<u64> {
        match self {
            Array::U8(v) => v.get(i).map(|&x| x as u64),
            Array::U16(v) => v.get(i).map(|&x| x as u64),
            Array::U32(v) => v.get(i).map(|&x| x as u64),
            Array::U64(v) => v.get(i).copied(),
            Array::I8(v) => v.get(i).and_then(|&x| u64::try_from(x).ok()),
            Array::I16(v) => v.get(i).and_then(|&x| u64::try_from(x).ok()),
            Array::I32(v) => v.get(i).and_then(|&x| u64::try_from(x).ok()),
            Array::I64(v) => v.get(i).and_then(|&x| u64::try_from(x).ok()),
            Array::Bool(v) => v.get(i).map(|&x| x as u64),
            _ => None,
        }
    }

    fn read(cur: &mut Cursor, depth: u32) -> Result<Array> {
        let offset = cur.offset();
        let id = cur.u32("an array's element type")?;
        if depth > limits::MAX_NESTING {
            return Err(Error::Limit { what: "an array nesting", offset, value: depth as u64, limit: limits::MAX_NESTING as u64 });
        }
        let min_bytes = match id {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(Error::BadValueType { id, offset }),
        };
        let n = cur.count("an array's length", limits::MAX_ARRAY, min_bytes)?;
        Ok(match id {
            0 => Array::U8(scalars!(cur, n, u8)),
            1 => Array::I8(scalars!(cur, n, i8)),
            2 => Array::U16(scalars!(cur, n, u16)),
            3 => Array::I16(scalars!(cur, n, i16)),
            4 => Array::U32(scalars!(cur, n, u32)),
            5 => Array::I32(scalars!(cur, n, i32)),
            6 => Array::F32(scalars!(cur, n, f32)),
            7 => Array::Bool((0..n).map(|_| read_bool(cur)).collect::<Result<_>>()?),
            8 => Array::String((0..n).map(|_| cur.string("a string in an array", limits::MAX_STRING)).collect::<Result<_>>()?),
            9 => Array::Array((0..n).map(|_| Array::read(cur, depth + 1)).collect::<Result<_>>()?),
            10 => Array::U64(scalars!(cur, n, u64)),
            11 => Array::I64(scalars!(cur, n, i64)),
            _ => Array::F64(scalars!(cur, n, f64)),
        })
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        out.write_u32::<LittleEndian>(self.type_id())?;
        out.write_u64::<LittleEndian>(self.len() as u64)?;
        match self {
            Array::U8(v) => out.write_all(v),
            Array::I8(v) => v.iter().try_for_each(|&x| out.write_i8(x)),
            Array::U16(v) => v.iter().try_for_each(|&x| out.write_u16::<LittleEndian>(x)),
            Array::I16(v) => v.iter().try_for_each(|&x| out.write_i16::<LittleEndian>(x)),
            Array::U32(v) => v.iter().try_for_each(|&x| out.write_u32::<LittleEndian>(x)),
            Array::I32(v) => v.iter().try_for_each(|&x| out.write_i32::<LittleEndian>(x)),
            Array::F32(v) => v.iter().try_for_each(|&x| out.write_f32::<LittleEndian>(x)),
            Array::Bool(v) => v.iter().try_for_each(|&x| out.write_u8(x as u8)),
            Array::String(v) => v.iter().try_for_each(|s| write_string(out, s)),
            Array::Array(v) => v.iter().try_for_each(|a| a.write(out)),
            Array::U64(v) => v.iter().try_for_each(|&x| out.write_u64::<LittleEndian>(x)),
            Array::I64(v) => v.iter().try_for_each(|&x| out.write_i64::<LittleEndian>(x)),
            Array::F64(v) => v.iter().try_for_each(|&x| out.write_f64::<LittleEndian>(x)),
        }
    }
}

pub(crate) fn write_string(out: &mut impl Write, s: &str) -> std::io::Result<()> {
    out.write_u64::<LittleEndian>(s.len() as u64)?;
    out.write_all(s.as_bytes())
}

impl Value {
    fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => 9,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// The type's name, for messages.
    pub fn type_name(&self) -> &'static str {
        const NAMES: [&str; 13] = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "a boolean", "a string", "an array", "u64", "i64", "f64"];
        NAMES[self.type_id() as usize]
    }

    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(x) => Some(x as u64),
            Value::U16(x) => Some(x as u64),
            Value::U32(x) => Some(x as u64),
            Value::U64(x) => Some(x),
            Value::I8(x) => u64::try_from(x).ok(),
            Value::I16(x) => u64::try_from(x).ok(),
            Value::I32(x) => u64::try_from(x).ok(),
            Value::I64(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x as f64),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }

    pub(crate) fn read(cur: &mut Cursor) -> Result<Value> {
        let offset = cur.offset();
        let what = "a metadata value";
        Ok(match cur.u32("a value type")? {
            0 => Value::U8(cur.u8(what)?),
            1 => Value::I8(cur.u8(what)? as i8),
            2 => Value::U16(cur.u16(what)?),
            3 => Value::I16(cur.u16(what)? as i16),
            4 => Value::U32(cur.u32(what)?),
            5 => Value::I32(cur.u32(what)? as i32),
            6 => Value::F32(f32::from_bits(cur.u32(what)?)),
            7 => Value::Bool(read_bool(cur)?),
            8 => Value::String(cur.string(what, limits::MAX_STRING)?),
            9 => Value::Array(Array::read(cur, 1)?),
            10 => Value::U64(cur.u64(what)?),
            11 => Value::I64(cur.u64(what)? as i64),
            12 => Value::F64(f64::from_bits(cur.u64(what)?)),
            id => return Err(Error::BadValueType { id, offset }),
        })
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        out.write_u32::<LittleEndian>(self.type_id())?;
        match self {
            Value::U8(x) => out.write_u8(*x),
            Value::I8(x) => out.write_i8(*x),
            Value::U16(x) => out.write_u16::<LittleEndian>(*x),
            Value::I16(x) => out.write_i16::<LittleEndian>(*x),
            Value::U32(x) => out.write_u32::<LittleEndian>(*x),
            Value::I32(x) => out.write_i32::<LittleEndian>(*x),
            Value::F32(x) => out.write_f32::<LittleEndian>(*x),
            Value::Bool(x) => out.write_u8(*x as u8),
            Value::String(s) => write_string(out, s),
            Value::Array(a) => a.write(out),
            Value::U64(x) => out.write_u64::<LittleEndian>(*x),
            Value::I64(x) => out.write_i64::<LittleEndian>(*x),
            Value::F64(x) => out.write_f64::<LittleEndian>(*x),
        }
    }
}

/// The key/value list of a file, in file order, with typed access whose errors name the key.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`, replacing an earlier value in place.
    pub fn set(&mut self, key: impl Into<String>, value: Value) {
        let key = key.into();
        match self.index.get(&key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    pub fn set_str(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.set(key, Value::String(value.into()));
    }

    pub fn set_u32(&mut self, key: impl Into<String>, value: u32) {
        self.set(key, Value::U32(value));
    }

    pub fn set_f32(&mut self, key: impl Into<String>, value: f32) {
        self.set(key, Value::F32(value));
    }

    /// Removes the keys for which `drop` is true.
    pub fn remove(&mut self, drop: impl Fn(&str) -> bool) {
        self.entries.retain(|(k, _)| !drop(k));
        self.index = self.entries.iter().enumerate().map(|(i, (k, _))| (k.clone(), i)).collect();
    }

    /// Adds a key read from a file; a second occurrence is an error.
    pub(crate) fn insert_new(&mut self, key: String, value: Value) -> Result<()> {
        if self.index.contains_key(&key) {
            return Err(Error::DuplicateKey { key });
        }
        self.set(key, value);
        Ok(())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &'static str, f: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match f(v) {
                Some(t) => Ok(Some(t)),
                None => Err(Error::WrongType { key: key.to_owned(), wanted, found: v.type_name() }),
            },
        }
    }

    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.typed(key, "a float", Value::as_f64)?.map(|x| x as f32))
    }

    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v.as_array() {
            Some(Array::String(s)) => Some(s.as_slice()),
            _ => None,
        })
    }

    pub fn opt_array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", Value::as_array)
    }

    pub fn str(&self, key: &str) -> Result<&str> {
        self.opt_str(key)?.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }

    pub fn u64(&self, key: &str) -> Result<u64> {
        self.opt_u64(key)?.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }

    pub fn f32(&self, key: &str) -> Result<f32> {
        self.opt_f32(key)?.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }

    pub fn strings(&self, key: &str) -> Result<&[String]> {
        self.opt_strings(key)?.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }
}

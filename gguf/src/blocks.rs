//! TABLE of block types: how a run of weights is laid out in bytes.
//!
//! One file a type under `blocks/`, one row here. A row gives every program
//! the type's id, name, sizes, decoder and (where there is one) encoder;
//! `kernels` adds speed, never meaning.

mod affine;
pub mod iq4_nl;
pub mod iq4_xs;
mod k_scales;
mod legacy;
pub mod plain;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
pub mod rounding;
mod searched;

use legacy::{f16_at, put_f16};

/// Decodes whole blocks: `bytes` holds n blocks, `out` their n × block_len values.
pub type DecodeFn = fn(bytes: &[u8], out: &mut [f32]);

/// Encodes whole blocks. `importance`, where given, weighs each value's
/// squared error (one per value, as from an importance matrix).
pub type EncodeFn = fn(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]);

/// One row of the table.
#[derive(Debug)]
pub struct BlockType {
    /// The `ggml_type` number stored in files.
    pub id: u32,
    /// The type's name as users write it.
    pub name: &'static str,
    /// Values in a block.
    pub block_len: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// None: the type is known by name and size only.
    pub decode: Option<DecodeFn>,
    /// None: the type can be read but not written.
    pub encode: Option<EncodeFn>,
}

impl PartialEq for BlockType {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for BlockType {}

impl BlockType {
    /// Bytes of `n` values, `n` a multiple of `block_len`.
    pub fn bytes_for(&self, n: u64) -> u64 {
        n / self.block_len as u64 * self.block_bytes as u64
    }

    /// True for F32, F16 and BF16 (and integers), whose blocks are single values.
    pub fn is_plain(&self) -> bool {
        self.block_len == 1
    }

    pub fn bits_per_weight(&self) -> f64 {
        self.block_bytes as f64 * 8.0 / self.block_len as f64
    }
}

/// What a block file provides. All methods work on whole blocks, allocate
/// nothing, and are inlined so that `kernels` can compile them once an ISA.
pub trait Codec {
    const LEN: usize;
    const BYTES: usize;

    /// One block: `b.len() == BYTES`, `out.len() == LEN`.
    fn decode_block(b: &[u8], out: &mut [f32]);

    #[inline(always)]
    fn decode(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.chunks_exact(Self::BYTES).zip(out.chunks_exact_mut(Self::LEN)) {
            Self::decode_block(b, o);
        }
    }
}

/// A codec that can also write its type.
pub trait Encode: Codec {
    /// Any number of blocks; see [`EncodeFn`].
    fn encode(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]);

    /// The same bytes, sooner where 16 f32 are one register and there are 32 of them.
    #[inline(always)]
    fn encode_wide(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        Self::encode(values, importance, out);
    }
}

/// The grid of one sub-block: w = step · (q + `Grid::OFFSET`) + min, or step · `iq4_nl::LEVELS`\[q\] with a codebook.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub step: f32,
    pub min: f32,
}

/// How a type stores its steps and mins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// Each as an f16.
    Floats,
    /// As integers in this range, of the block's own `Grid::units`.
    Integers { lo: i32, hi: i32 },
}

/// A codec whose values are levels times a step, so that its scales and its
/// quants can be chosen apart: what calibrated rounding works through.
///
/// The provided methods are those of the 32-value types: an f16 step, then an
/// f16 min where there is one.
pub trait Grid: Encode {
    /// Values that share a step; divides `LEN`.
    const SUB: usize = 32;
    /// Quants are 0..=TOP.
    const TOP: u8;
    const OFFSET: i32;
    /// Whether the levels are those of `iq4_nl`, and not evenly spaced.
    const CODEBOOK: bool = false;
    /// Whether mins are stored; else they are 0.
    const HAS_MIN: bool;
    const SCALES: Scales = Scales::Floats;

    /// What the integers of steps and of mins count (d and −dmin); ones for floats.
    #[inline(always)]
    fn units(_b: &[u8]) -> (f32, f32) {
        (1.0, 1.0)
    }

    /// The grid of sub-block `sub` of a block, exactly as `decode_block` has it.
    #[inline(always)]
    fn step(b: &[u8], _sub: usize) -> Step {
        Step { step: f16_at(b, 0), min: if Self::HAS_MIN { f16_at(b, 2) } else { 0.0 } }
    }

    /// Stores one; representable values only, which `step` then gives back.
    #[inline(always)]
    fn set_step(b: &mut [u8], _sub: usize, s: Step) {
        put_f16(b, 0, s.step);
        if Self::HAS_MIN {
            put_f16(b, 2, s.min);
        }
    }

    /// Stores a block's `LEN` quants and leaves its scales.
    fn pack(q: &[u8], b: &mut [u8]);
}

/// Calls `$m!` with the list of implemented codecs, `NAME path id encode|decode`:
/// the single registration from which this table and the per-ISA tables of
/// `kernels` are made.
#[macro_export]
macro_rules! for_each_codec {
    ($m:ident) => {
        $m! {
            F32 plain::F32 0 encode,
            F16 plain::F16 1 encode,
            Q4_0 q4_0::Q4_0 2 encode,
            Q4_1 q4_1::Q4_1 3 encode,
            Q5_0 q5_0::Q5_0 6 encode,
            Q5_1 q5_1::Q5_1 7 encode,
            Q8_0 q8_0::Q8_0 8 encode,
            Q2_K q2_k::Q2K 10 decode,
            Q3_K q3_k::Q3K 11 decode,
            Q4_K q4_k::Q4K 12 encode,
            Q5_K q5_k::Q5K 13 encode,
            Q6_K q6_k::Q6K 14 encode,
            IQ4_NL iq4_nl::Iq4Nl 20 encode,
            IQ4_XS iq4_xs::Iq4Xs 23 encode,
            BF16 plain::Bf16 30 encode,
        }
    };
}

macro_rules! encode_of {
    (encode, $codec:ty) => {
        Some(<$codec as Encode>::encode as EncodeFn)
    };
    (decode, $codec:ty) => {
        None
    };
}

macro_rules! statics {
    ($($name:ident $module:ident :: $codec:ident $id:literal $mode:ident,)*) => {
        $(pub static $name: BlockType = BlockType {
            id: $id,
            name: stringify!($name),
            block_len: <$module::$codec as Codec>::LEN,
            block_bytes: <$module::$codec as Codec>::BYTES,
            decode: Some(<$module::$codec as Codec>::decode as DecodeFn),
            encode: encode_of!($mode, $module::$codec),
        };)*
        /// The types this program can decode.
        static DECODABLE: &[&BlockType] = &[$(&$name),*];
    };
}
for_each_codec!(statics);

/// A type known only by name and size, so that a file that holds it can be inspected and refused by name.
const fn named(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> BlockType {
    BlockType { id, name, block_len, block_bytes, decode: None, encode: None }
}

static NAMED: &[BlockType] = &[
    named(9, "Q8_1", 32, 36),
    named(15, "Q8_K", 256, 292),
    named(16, "IQ2_XXS", 256, 66),
    named(17, "IQ2_XS", 256, 74),
    named(18, "IQ3_XXS", 256, 98),
    named(19, "IQ1_S", 256, 50),
    named(21, "IQ3_S", 256, 110),
    named(22, "IQ2_S", 256, 82),
    named(24, "I8", 1, 1),
    named(25, "I16", 1, 2),
    named(26, "I32", 1, 4),
    named(27, "I64", 1, 8),
    named(28, "F64", 1, 8),
    named(29, "IQ1_M", 256, 56),
    named(34, "TQ1_0", 256, 54),
    named(35, "TQ2_0", 256, 66),
    named(39, "MXFP4", 32, 17),
    named(40, "NVFP4", 64, 36),
    named(41, "Q1_0", 128, 18),
    named(42, "Q2_0", 64, 18),
];

/// Every type with a row: the decodable ones first, then those known by name.
pub fn table() -> impl Iterator<Item = &'static BlockType> {
    DECODABLE.iter().copied().chain(NAMED.iter())
}

pub fn by_id(id: u32) -> Option<&'static BlockType> {
    table().find(|b| b.id == id)
}

/// By name, in any case.
pub fn by_name(name: &str) -> Option<&'static BlockType> {
    table().find(|b| b.name.eq_ignore_ascii_case(name))
}

/// Names of the decodable types, for messages.
pub fn decodable_names() -> String {
    DECODABLE.iter().map(|b| b.name).collect::<Vec<_>>().join(" ")
}

/// What is known of an id without a row.
pub(crate) fn hint_for(id: u32) -> &'static str {
    match id {
        4 | 5 | 31..=33 | 36..=38 => " (removed from the format; convert the model again)",
        97..=99 | 133..=158 | 200.. => " (a type only ik_llama.cpp writes; requantize to a standard type)",
        _ => "",
    }
}

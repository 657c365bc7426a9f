//! Block encoders and decoders compiled for each ISA: the code is `gguf`'s,
//! the speed comes from the features it is compiled with. Results are the
//! same bytes on every ISA, because no operation is reordered or fused.

use crate::isa::{self, Isa, Op, Uses};
use gguf::blocks::*;

struct Encoder<'a, C> {
    values: &'a [f32],
    importance: Option<&'a [f32]>,
    out: &'a mut [u8],
    codec: std::marker::PhantomData<C>,
}

impl<C: Encode> Op for Encoder<'_, C> {
    const USES: Uses = Uses::Vectors;
    type Out = ();
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        match I::WIDE {
            true => C::encode_wide(self.values, self.importance, self.out),
            false => C::encode(self.values, self.importance, self.out),
        }
    }
}

struct Decoder<'a, C> {
    bytes: &'a [u8],
    out: &'a mut [f32],
    codec: std::marker::PhantomData<C>,
}

impl<C: Codec> Op for Decoder<'_, C> {
    const USES: Uses = Uses::Vectors;
    type Out = ();
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        C::decode(self.bytes, self.out);
    }
}

struct Prefetch<'a>(&'a [u8]);

impl Op for Prefetch<'_> {
    const USES: Uses = Uses::Vectors;
    type Out = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for line in (0..self.0.len()).step_by(64) {
            isa.prefetch(self.0.as_ptr().wrapping_add(line));
        }
    }
}

/// Asks for `bytes` to come into the cache while something else is computed.
pub fn prefetch(bytes: &[u8]) {
    isa::run(Prefetch(bytes));
}

fn encode_with<C: Encode>(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    isa::run(Encoder { values, importance, out, codec: std::marker::PhantomData::<C> });
}

fn decode_with<C: Codec>(bytes: &[u8], out: &mut [f32]) {
    isa::run(Decoder { bytes, out, codec: std::marker::PhantomData::<C> });
}

macro_rules! encode_row {
    (encode, $codec:ty) => {
        Some(encode_with::<$codec> as EncodeFn)
    };
    (decode, $codec:ty) => {
        None
    };
}

macro_rules! rows {
    ($($name:ident $module:ident :: $codec:ident $id:literal $mode:ident,)*) => {
        static ROWS: &[(&BlockType, DecodeFn, Option<EncodeFn>)] =
            &[$((&$name, decode_with::<$module::$codec>, encode_row!($mode, $module::$codec))),*];
    };
}
gguf::for_each_codec!(rows);

/// The encoder of a type in force on this CPU; see [`EncodeFn`].
pub fn encoder(block: &BlockType) -> Option<EncodeFn> {
    ROWS.iter().find(|r| r.0 == block).and_then(|r| r.2)
}

/// The decoder of a type in force on this CPU; see [`DecodeFn`].
pub fn decoder(block: &BlockType) -> Option<DecodeFn> {
    ROWS.iter().find(|r| r.0 == block).map(|r| r.1)
}

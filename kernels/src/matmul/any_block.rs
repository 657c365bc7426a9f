//! Decode-then-dot: the kernel of every type that has no file of its own, and
//! of F32, F16 and BF16. 256 weights at a time are decoded to floats on the
//! stack and multiplied with the unquantized activations.

use super::WeightDot;
use super::activation::{ActivationFormat, ActivationRow};
use super::panel::{Floats, LANES, PanelWeights, SLAB};
use crate::isa::{Isa, each};
use gguf::blocks::Codec;

pub struct Decoded<C>(std::marker::PhantomData<fn() -> C>);

const CHUNK: usize = 256;

impl<C: Codec + 'static> WeightDot for Decoded<C> {
    const ACTIVATION: ActivationFormat = ActivationFormat::Float;
    // Float rounding of a sum of up to 2^16 products, 16 lanes wide.
    const TOLERANCE: f32 = 4e-6;

    #[inline(always)]
    fn dot<I: Isa, const R: usize>(isa: I, rows: [&[u8]; R], x: &ActivationRow<'_>) -> [f32; R] {
        let mut w = [0.0f32; CHUNK];
        let mut acc = [[isa.zero_float(); 4]; R];
        let mut tail = [0.0f32; R];
        let chunk_bytes = CHUNK / C::LEN * C::BYTES;
        for (i, x) in x.x.chunks(CHUNK).enumerate() {
            for r in 0..R {
                let end = rows[r].len().min((i + 1) * chunk_bytes);
                let bytes = &rows[r][i * chunk_bytes..end];
                super::prefetch_block(isa, bytes);
                C::decode(bytes, &mut w[..x.len()]);
                let (wc, wr) = w[..x.len()].as_chunks::<16>();
                let (xc, xr) = x.as_chunks::<16>();
                for (j, (w, x)) in wc.iter().zip(xc).enumerate() {
                    acc[r][j % 4] = isa.mul_add(isa.load_float(w), isa.load_float(x), acc[r][j % 4]);
                }
                for (w, x) in wr.iter().zip(xr) {
                    tail[r] += w * x;
                }
            }
        }
        each!(R, |r| isa.sum(acc[r][0]) + isa.sum(acc[r][1]) + isa.sum(acc[r][2]) + isa.sum(acc[r][3]) + tail[r])
    }
}

impl<C: Codec + 'static> PanelWeights for Decoded<C> {
    type Codec = C;
    type Panel = Floats;

    #[inline(always)]
    fn unpack<I: Isa>(isa: I, rows: &[&[u8]; LANES], p: &mut Floats) {
        let mut decoded = [[0.0f32; SLAB]; LANES];
        for (out, row) in decoded.iter_mut().zip(rows) {
            C::decode(row, out);
        }
        for (part, out) in p.w.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            *out = isa.transpose_floats(each!(LANES, |r| decoded[r][16 * part..].first_chunk().expect("256 values")));
        }
    }
}

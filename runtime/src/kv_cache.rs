//! Keys and values of past tokens, one region a layer and KV head:
//! [n_kv_heads][capacity][dim]. Capacity is fixed when the cache is made; the
//! system backs its pages only as tokens arrive.

use crate::error::{Error, Result};
use gguf::Hparams;
use gguf::arch::Dim;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use kernels::Pool;
use kernels::attention::{KV_BLOCK, KvView};
use std::sync::Mutex;

/// Storage types of the cache, by the names users write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    F16,
    /// For parity checks.
    F32,
    Q8_0,
    Q4_0,
}

const NAMES: [(&str, KvType); 4] = [("f16", KvType::F16), ("f32", KvType::F32), ("q8_0", KvType::Q8_0), ("q4_0", KvType::Q4_0)];

impl KvType {
    pub fn by_name(name: &str) -> Option<KvType> {
        NAMES.iter().find(|(n, _)| *n == name).map(|k| k.1)
    }

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, k)| *k == self).map_or("", |k| k.0)
    }

    /// Bytes of `n` elements.
    pub fn bytes(self, n: u64) -> u64 {
        match self {
            KvType::F16 => n * 2,
            KvType::F32 => n * 4,
            KvType::Q8_0 => n.div_ceil(32) * 34,
            KvType::Q4_0 => n.div_ceil(32) * 18,
        }
    }
}

/// What a model is to remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Texts side by side.
    pub sequences: usize,
    /// Tokens of each.
    pub context: usize,
    pub kv: KvType,
}

impl CacheShape {
    /// Of one sequence.
    pub fn one(context: usize, kv: KvType) -> CacheShape {
        CacheShape { sequences: 1, context, kv }
    }

    /// Tokens of all sequences.
    pub fn tokens(self) -> usize {
        self.sequences * self.context
    }
}

/// One layer's keys or values: n_kv_heads × capacity rows of `dim`. Integers
/// and plain floats, whose zeroed pages cost nothing until written. The
/// quantized forms keep quants and scales apart, in as many bytes as the block
/// types of their names.
enum Store {
    F16(Vec<u16>),
    F32(Vec<f32>),
    Q8 { q: Vec<i8>, d: Vec<u16> },
    Q4 { q: Vec<u8>, d: Vec<u16> },
}

impl Store {
    fn zeroed(kind: KvType, n: usize, dim: usize, needed: usize) -> Result<Store> {
        let out_of_memory = || Error::OutOfMemory { what: "KV cache", needed };
        if matches!(kind, KvType::Q8_0 | KvType::Q4_0) && !dim.is_multiple_of(KV_BLOCK) {
            return Err(Error::BadOption {
                what: "the KV type",
                value: kind.name().into(),
                rule: "f16 or f32 for a model whose head dimension is not a multiple of 32",
            });
        }
        // A failing reservation is an error, not an abort; the zeroed vector then takes its place.
        Vec::<u8>::new().try_reserve_exact(kind.bytes(n as u64) as usize).map_err(|_| out_of_memory())?;
        Ok(match kind {
            KvType::F16 => Store::F16(vec![0; n]),
            KvType::F32 => Store::F32(vec![0.0; n]),
            KvType::Q8_0 => Store::Q8 { q: vec![0; n], d: vec![0; n / KV_BLOCK] },
            KvType::Q4_0 => Store::Q4 { q: vec![0; n / 2], d: vec![0; n / KV_BLOCK] },
        })
    }

    /// The store in `n` equal parts (one a KV head), to be written apart.
    fn heads(&mut self, n: usize) -> Vec<HeadMut<'_>> {
        fn parts<T>(v: &mut [T], n: usize) -> impl Iterator<Item = &mut [T]> {
            let len = v.len() / n;
            v.chunks_exact_mut(len.max(1))
        }
        match self {
            Store::F16(x) => parts(x, n).map(HeadMut::F16).collect(),
            Store::F32(x) => parts(x, n).map(HeadMut::F32).collect(),
            Store::Q8 { q, d } => parts(q, n).zip(parts(d, n)).map(|(q, d)| HeadMut::Q8 { q, d }).collect(),
            Store::Q4 { q, d } => parts(q, n).zip(parts(d, n)).map(|(q, d)| HeadMut::Q4 { q, d }).collect(),
        }
    }

    fn view(&self) -> KvView<'_> {
        match self {
            Store::F16(x) => KvView::F16(x),
            Store::F32(x) => KvView::F32(x),
            Store::Q8 { q, d } => KvView::Q8 { q, d },
            Store::Q4 { q, d } => KvView::Q4 { q, d },
        }
    }
}

/// One KV head's rows, to be written.
enum HeadMut<'a> {
    F16(&'a mut [u16]),
    F32(&'a mut [f32]),
    Q8 { q: &'a mut [i8], d: &'a mut [u16] },
    Q4 { q: &'a mut [u8], d: &'a mut [u16] },
}

impl HeadMut<'_> {
    /// Values from element `at` on; a multiple of 32 where blocks are written.
    fn write(&mut self, at: usize, x: &[f32]) {
        match self {
            HeadMut::F16(bits) => {
                let halves: &mut [f16] = bits[at..at + x.len()].reinterpret_cast_mut();
                halves.convert_from_f32_slice(x);
            }
            HeadMut::F32(v) => v[at..at + x.len()].copy_from_slice(x),
            HeadMut::Q8 { q, d } => {
                let blocks = q[at..].chunks_exact_mut(KV_BLOCK).zip(&mut d[at / KV_BLOCK..]);
                for (x, (q, d)) in x.chunks_exact(KV_BLOCK).zip(blocks) {
                    let scale = f16::from_f32(peak(x).abs() / 127.0);
                    *d = scale.to_bits();
                    let inverse = inverse(scale.to_f32());
                    q.iter_mut().zip(x).for_each(|(q, x)| *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8);
                }
            }
            HeadMut::Q4 { q, d } => {
                let blocks = q[at / 2..].chunks_exact_mut(KV_BLOCK / 2).zip(&mut d[at / KV_BLOCK..]);
                for (x, (q, d)) in x.chunks_exact(KV_BLOCK).zip(blocks) {
                    // As Q4_0: the largest value becomes −8.
                    let scale = f16::from_f32(peak(x) / -8.0);
                    *d = scale.to_bits();
                    let inverse = inverse(scale.to_f32());
                    let quant = |x: f32| (x * inverse + 8.0).round_ties_even().clamp(0.0, 15.0) as u8;
                    q.iter_mut().enumerate().for_each(|(j, q)| *q = quant(x[j]) | quant(x[j + 16]) << 4);
                }
            }
        }
    }
}

/// The value of largest magnitude.
fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m })
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

pub struct KvCache {
    capacity: usize,
    len: usize,
    n_kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// A layer's K and V.
    layers: Vec<(Store, Store)>,
}

impl KvCache {
    pub fn new(h: &Hparams, capacity: usize, kind: KvType) -> Result<KvCache> {
        KvCache::for_layers(h, h.n_layers as usize, capacity, kind)
    }

    /// For the first `n_layers` layers only.
    pub(crate) fn for_layers(h: &Hparams, n_layers: usize, capacity: usize, kind: KvType) -> Result<KvCache> {
        let needed = kind.bytes(h.kv_elements_per_token()).checked_mul(capacity as u64);
        let needed = needed.and_then(|n| usize::try_from(n).ok()).filter(|&n| n < isize::MAX as usize);
        let needed = needed.ok_or(Error::OutOfMemory { what: "KV cache", needed: usize::MAX })?;
        let zeroed = |n: u64, dim: u64| Store::zeroed(kind, n as usize * capacity, dim as usize, needed);
        let layers = (0..n_layers)
            .map(|_| Ok((zeroed(h.dim(Dim::K), h.head_dim)?, zeroed(h.dim(Dim::V), h.value_dim)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(KvCache {
            capacity,
            len: 0,
            n_kv_heads: h.n_kv_heads as usize,
            key_dim: h.head_dim as usize,
            value_dim: h.value_dim as usize,
            layers,
        })
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens from position `n` on.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(n);
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// Stores K and V (tokens × n_kv_heads × dim) of a layer from position `len` on, a head a task.
    pub(crate) fn append(&mut self, pool: &Pool, layer: usize, k: &[f32], v: &[f32]) {
        let (n_heads, at) = (self.n_kv_heads, self.len);
        let (keys, values) = &mut self.layers[layer];
        let write = |head: &mut HeadMut, g: usize, x: &[f32], dim: usize| {
            for (t, token) in x.chunks_exact(n_heads * dim).enumerate() {
                head.write((at + t) * dim, &token[g * dim..(g + 1) * dim]);
            }
        };
        let (key_dim, value_dim) = (self.key_dim, self.value_dim);
        let heads = keys.heads(n_heads).into_iter().zip(values.heads(n_heads));
        if k.len() == n_heads * key_dim {
            for (g, (mut kh, mut vh)) in heads.enumerate() {
                write(&mut kh, g, k, key_dim);
                write(&mut vh, g, v, value_dim);
            }
            return;
        }
        // Each task takes its head out; the locks are never contended.
        let heads: Vec<_> = heads.map(|h| Mutex::new(Some(h))).collect();
        pool.for_each(n_heads, |g| {
            if let Some((mut kh, mut vh)) = heads[g].lock().ok().and_then(|mut h| h.take()) {
                write(&mut kh, g, k, key_dim);
                write(&mut vh, g, v, value_dim);
            }
        });
    }

    pub(crate) fn layer(&self, layer: usize) -> (KvView<'_>, KvView<'_>) {
        let (k, v) = &self.layers[layer];
        (k.view(), v.view())
    }
}

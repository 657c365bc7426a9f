//! Keys and values of past tokens, f16, one region a layer and KV head:
//! [n_kv_heads][capacity][dim]. Capacity is fixed when the cache is made; the
//! system backs its pages only as tokens arrive.

use crate::error::{Error, Result};
use gguf::Hparams;
use gguf::arch::Dim;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use kernels::attention::KvView;

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

/// One layer's keys or values. f16 is kept as bits: zeroed pages of integers
/// and floats cost nothing until written.
enum Store {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl Store {
    fn zeroed(kind: KvType, n: usize, needed: usize) -> Result<Store> {
        let out_of_memory = || Error::OutOfMemory { what: "KV cache", needed };
        // A failing reservation is an error, not an abort; the zeroed vector then takes its place.
        Vec::<u8>::new().try_reserve_exact(kind.bytes(n as u64) as usize).map_err(|_| out_of_memory())?;
        match kind {
            KvType::F16 => Ok(Store::F16(vec![0; n])),
            KvType::F32 => Ok(Store::F32(vec![0.0; n])),
            KvType::Q8_0 | KvType::Q4_0 => Err(Error::BadOption {
                what: "the KV type",
                value: kind.name().into(),
                rule: "f16 to run; q8_0 and q4_0 can only be planned for",
            }),
        }
    }

    fn write(&mut self, at: usize, x: &[f32]) {
        match self {
            Store::F16(bits) => {
                let halves: &mut [f16] = bits[at..at + x.len()].reinterpret_cast_mut();
                halves.convert_from_f32_slice(x);
            }
            Store::F32(v) => v[at..at + x.len()].copy_from_slice(x),
        }
    }

    fn view(&self) -> KvView<'_> {
        match self {
            Store::F16(bits) => KvView::F16(bits.as_slice().reinterpret_cast()),
            Store::F32(v) => KvView::F32(v),
        }
    }
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
        let needed = kind.bytes(h.kv_elements_per_token()).checked_mul(capacity as u64);
        let needed = needed.and_then(|n| usize::try_from(n).ok()).filter(|&n| n < isize::MAX as usize);
        let needed = needed.ok_or(Error::OutOfMemory { what: "KV cache", needed: usize::MAX })?;
        let zeroed = |n: u64| Store::zeroed(kind, n as usize * capacity, needed);
        let layers = (0..h.n_layers).map(|_| Ok((zeroed(h.dim(Dim::K))?, zeroed(h.dim(Dim::V))?))).collect::<Result<Vec<_>>>()?;
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

    /// Stores K and V (tokens × n_kv_heads × dim) of a layer from position `len` on.
    pub(crate) fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) {
        let (heads, capacity, at) = (self.n_kv_heads, self.capacity, self.len);
        let (kl, vl) = &mut self.layers[layer];
        for (store, x, dim) in [(kl, k, self.key_dim), (vl, v, self.value_dim)] {
            for (t, token) in x.chunks_exact(heads * dim).enumerate() {
                for (g, head) in token.chunks_exact(dim).enumerate() {
                    store.write((g * capacity + at + t) * dim, head);
                }
            }
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> (KvView<'_>, KvView<'_>) {
        let (k, v) = &self.layers[layer];
        (k.view(), v.view())
    }
}

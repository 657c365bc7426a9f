//! Keys and values of past tokens, f16, one region a layer and KV head:
//! [n_kv_heads][capacity][dim]. Capacity is fixed when the cache is made; the
//! system backs its pages only as tokens arrive.

use crate::error::{Error, Result};
use gguf::Hparams;
use gguf::arch::Dim;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Storage types of the cache, by the names users write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    F16,
    Q8_0,
    Q4_0,
}

impl KvType {
    pub fn by_name(name: &str) -> Option<KvType> {
        [("f16", KvType::F16), ("q8_0", KvType::Q8_0), ("q4_0", KvType::Q4_0)].into_iter().find(|(n, _)| *n == name).map(|k| k.1)
    }

    /// Bytes of `n` elements.
    pub fn bytes(self, n: u64) -> u64 {
        match self {
            KvType::F16 => n * 2,
            KvType::Q8_0 => n.div_ceil(32) * 34,
            KvType::Q4_0 => n.div_ceil(32) * 18,
        }
    }
}

pub struct KvCache {
    capacity: usize,
    len: usize,
    n_kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// A layer's K and V, as bits: zeroed pages of integers cost nothing until written.
    layers: Vec<(Vec<u16>, Vec<u16>)>,
}

impl KvCache {
    pub fn new(h: &Hparams, capacity: usize) -> Result<KvCache> {
        let needed = KvType::F16.bytes(h.kv_elements_per_token()).checked_mul(capacity as u64);
        let needed = needed.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
        let zeroed = |n: u64| -> Result<Vec<u16>> {
            let n = (n as usize).checked_mul(capacity).filter(|&n| n < isize::MAX as usize / 2);
            let n = n.ok_or(Error::OutOfMemory { what: "KV cache", needed })?;
            // A failing reservation is an error, not an abort; the zeroed vector then takes its place.
            Vec::<u16>::new().try_reserve_exact(n).map_err(|_| Error::OutOfMemory { what: "KV cache", needed })?;
            Ok(vec![0u16; n])
        };
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
            let store: &mut [f16] = store.as_mut_slice().reinterpret_cast_mut();
            for (t, token) in x.chunks_exact(heads * dim).enumerate() {
                for (g, head) in token.chunks_exact(dim).enumerate() {
                    let start = (g * capacity + at + t) * dim;
                    store[start..start + dim].convert_from_f32_slice(head);
                }
            }
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> (&[f16], &[f16]) {
        let (k, v) = &self.layers[layer];
        (k.as_slice().reinterpret_cast(), v.as_slice().reinterpret_cast())
    }
}

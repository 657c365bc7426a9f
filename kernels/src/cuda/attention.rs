//! The cache of keys and values on a GPU, and launches of `cuda/rotate.cu` and `cuda/attention.cu`.

use super::{Address, Buffer, Device, Shape};
use crate::attention::KV_BLOCK;
use crate::error::{Error, Result};

/// How keys and values are stored: `enum KvType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    F16 = 0,
    Q8 = 1,
    Q4 = 2,
}

impl CacheType {
    /// (bytes of quants or halves, bytes of scales) of `n` values, a multiple of 32 where quantized.
    fn bytes(self, n: usize) -> (usize, usize) {
        match self {
            CacheType::F16 => (2 * n, 0),
            CacheType::Q8 => (n, n / KV_BLOCK * 2),
            CacheType::Q4 => (n / 2, n / KV_BLOCK * 2),
        }
    }
}

/// What a model's attention has in every layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub n_kv_heads: usize,
    /// Query heads a KV head.
    pub group: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

/// The largest head dimension that `attention.cu` is compiled for.
const MOST_DIM: usize = 128;

/// One layer's keys and values: [n_kv_heads][capacity][dim] of each.
pub struct LayerCache {
    heads: Heads,
    capacity: usize,
    kind: CacheType,
    keys: Buffer,
    values: Buffer,
}

/// `struct Store`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Store {
    quants: Address,
    scales: Address,
}

impl LayerCache {
    pub fn bytes_for(heads: Heads, capacity: usize, kind: CacheType) -> [usize; 2] {
        [heads.key_dim, heads.value_dim].map(|dim| {
            let (quants, scales) = kind.bytes(heads.n_kv_heads * capacity * dim);
            quants.next_multiple_of(16) + scales
        })
    }

    /// Whether the kernels take such heads.
    pub fn check(heads: Heads, kind: CacheType) -> Result<()> {
        let dims = [heads.key_dim, heads.value_dim];
        let unit = if kind == CacheType::F16 { 8 } else { KV_BLOCK };
        if dims.iter().any(|d| *d > MOST_DIM || !d.is_multiple_of(unit) || *d == 0) {
            let cause = format!("heads of {} and {} values; it takes multiples of {unit} up to {MOST_DIM}", dims[0], dims[1]);
            return Err(Error::Gpu { what: "attention", cause });
        }
        Ok(())
    }

    pub fn new(device: &Device, heads: Heads, capacity: usize, kind: CacheType) -> Result<LayerCache> {
        LayerCache::check(heads, kind)?;
        let [k, v] = LayerCache::bytes_for(heads, capacity, kind);
        Ok(LayerCache { heads, capacity, kind, keys: device.allocate("KV cache", k)?, values: device.allocate("KV cache", v)? })
    }

    fn stores(&self) -> [Store; 2] {
        [(&self.keys, self.heads.key_dim), (&self.values, self.heads.value_dim)].map(|(buffer, dim)| {
            let (quants, scales) = self.kind.bytes(self.heads.n_kv_heads * self.capacity * dim);
            let aligned = quants.next_multiple_of(16);
            Store { quants: buffer.part(0, quants), scales: buffer.part(aligned, scales) }
        })
    }
}

/// What lies between the projections and attention; None where a model has none.
#[derive(Default)]
pub struct Rotation<'a> {
    /// Of queries, keys, values.
    pub biases: [Option<&'a Buffer>; 3],
    /// Of each head of queries, of keys.
    pub norms: [Option<&'a Buffer>; 2],
    pub eps: f32,
    /// Rotated pairs of a head; pairs (2i, 2i + 1) if `adjacent`, else (i, i + pairs).
    pub pairs: usize,
    pub adjacent: bool,
    /// cos and sin, [token][pair]
    pub tables: Option<[&'a Buffer; 2]>,
    /// Each token's factor of its queries.
    pub q_scales: Option<&'a Buffer>,
}

/// `struct RotateArgs`.
#[repr(C)]
struct RotateArgs {
    qkv: [Address; 3],
    biases: [Address; 3],
    norms: [Address; 2],
    tables: [Address; 2],
    q_scales: Address,
    keys: Store,
    values: Store,
    n_heads: u32,
    n_kv_heads: u32,
    key_dim: u32,
    value_dim: u32,
    pairs: u32,
    adjacent: u32,
    first_position: u32,
    capacity: u32,
    kv_type: u32,
    eps: f32,
}

/// Queries are rotated in place, keys and values go to the cache from `first_position` on.
/// `qkv`: [token][heads · dim] of each.
pub fn rotate(
    device: &Device,
    r: &Rotation<'_>,
    qkv: [&Buffer; 3],
    cache: &mut LayerCache,
    first_position: usize,
    n_tokens: usize,
) -> Result<()> {
    let h = cache.heads;
    assert!(n_tokens > 0 && first_position + n_tokens <= cache.capacity, "the cache is full");
    assert!(2 * r.pairs <= h.key_dim && (r.pairs == 0 || r.tables.is_some()));
    let rows = [h.n_kv_heads * h.group * h.key_dim, h.n_kv_heads * h.key_dim, h.n_kv_heads * h.value_dim];
    let [keys, values] = cache.stores();
    let or_null = |b: Option<&Buffer>, floats: usize| b.map_or(0, |b| b.part(0, 4 * floats));
    let args = RotateArgs {
        qkv: std::array::from_fn(|i| qkv[i].part(0, 4 * n_tokens * rows[i])),
        biases: std::array::from_fn(|i| or_null(r.biases[i], rows[i])),
        norms: r.norms.map(|n| or_null(n, h.key_dim)),
        tables: std::array::from_fn(|i| or_null(r.tables.map(|t| t[i]), n_tokens * r.pairs)),
        q_scales: or_null(r.q_scales, n_tokens),
        keys,
        values,
        n_heads: (h.n_kv_heads * h.group) as u32,
        n_kv_heads: h.n_kv_heads as u32,
        key_dim: h.key_dim as u32,
        value_dim: h.value_dim as u32,
        pairs: r.pairs as u32,
        adjacent: u32::from(r.adjacent),
        first_position: first_position as u32,
        capacity: cache.capacity as u32,
        kv_type: cache.kind as u32,
        eps: r.eps,
    };
    let heads = h.n_kv_heads * (h.group + 2);
    let shape = Shape { grid: [heads as u32, n_tokens as u32, 1], threads: 32, shared: 4 * MOST_DIM as u32 };
    // SAFETY: RotateArgs; every buffer was checked by `part`, and positions by the assertion.
    unsafe { device.launch("rotate", shape, &args) }
}

/// `struct AttentionArgs`.
#[repr(C)]
struct AttentionArgs {
    q: Address,
    out: Address,
    partial: Address,
    keys: Store,
    values: Store,
    n_tokens: u32,
    n_kv_heads: u32,
    group: u32,
    key_dim: u32,
    value_dim: u32,
    first_position: u32,
    capacity: u32,
    window: u32,
    kv_type: u32,
    n_splits: u32,
    scale: f32,
}

/// From so many rows (tokens × query heads of a group) on, warps share tiles.
const MANY_ROWS: usize = 17;
/// Rows of a block, its threads, and the positions and padding of a tile in shared memory.
const ROWS: usize = 16;
const THREADS: usize = 128;
const TILE: usize = 32;
const PADDING: usize = 8;
/// Positions that a split has at least, and most splits.
const SPLIT_MIN: usize = 256;
const MOST_SPLITS: usize = 64;

/// Floats of the buffer that attention over few rows needs.
pub fn partial_floats(heads: Heads, max_tokens: usize) -> usize {
    let tokens = max_tokens.min((MANY_ROWS - 1) / heads.group.max(1)).max(1);
    MOST_SPLITS * tokens * heads.n_kv_heads * heads.group * (heads.value_dim + 2)
}

/// Attention of tokens `first_position..` over the cache, their own keys and values already in it.
/// `q`, `out`: [token][heads · dim]; `window`: positions a token sees, its own included.
pub fn attention(
    device: &Device,
    cache: &LayerCache,
    q: &Buffer,
    out: &Buffer,
    partial: &Buffer,
    first_position: usize,
    n_tokens: usize,
    window: usize,
) -> Result<()> {
    let h = cache.heads;
    assert!(n_tokens > 0 && first_position + n_tokens <= cache.capacity);
    let (rows, heads) = (n_tokens * h.group, h.n_kv_heads * h.group);
    let many = rows >= MANY_ROWS;
    let seen = (first_position + n_tokens).min(window.saturating_add(n_tokens));
    let n_splits = if many { 1 } else { (seen / SPLIT_MIN).clamp(1, MOST_SPLITS) };
    let [keys, values] = cache.stores();
    let args = AttentionArgs {
        q: q.part(0, 4 * n_tokens * heads * h.key_dim),
        out: out.part(0, 4 * n_tokens * heads * h.value_dim),
        partial: if n_splits == 1 { 0 } else { partial.part(0, 4 * n_splits * n_tokens * heads * (h.value_dim + 2)) },
        keys,
        values,
        n_tokens: n_tokens as u32,
        n_kv_heads: h.n_kv_heads as u32,
        group: h.group as u32,
        key_dim: h.key_dim as u32,
        value_dim: h.value_dim as u32,
        first_position: first_position as u32,
        capacity: cache.capacity as u32,
        window: window.min(u32::MAX as usize) as u32,
        kv_type: cache.kind as u32,
        n_splits: n_splits as u32,
        scale: std::f32::consts::LOG2_E / (h.key_dim as f32).sqrt(),
    };
    let d = if h.key_dim.max(h.value_dim) <= 64 { 64 } else { MOST_DIM };
    let name = match (many, d) {
        (true, 64) => "attention_many_64",
        (true, _) => "attention_many_128",
        (false, 64) => "attention_few_64",
        (false, _) => "attention_few_128",
    };
    let warps = THREADS / 32;
    let tile = 2 * TILE * (d + PADDING) * 2;
    let shared = if many { tile } else { warps * tile.max(ROWS * (d + 2) * 4) };
    let block_rows = if many { ROWS * warps } else { ROWS };
    let shape = Shape {
        grid: [rows.div_ceil(block_rows) as u32, h.n_kv_heads as u32, n_splits as u32],
        threads: THREADS as u32,
        shared: shared as u32,
    };
    // SAFETY: AttentionArgs; every buffer was checked by `part`, and positions by the assertion.
    unsafe { device.launch(name, shape, &args) }?;
    if n_splits == 1 {
        return Ok(());
    }
    let shape = Shape { grid: [(n_tokens * heads) as u32, 1, 1], threads: THREADS as u32, shared: 0 };
    // SAFETY: as above.
    unsafe { device.launch("attention_merge", shape, &args) }
}

//! The cache of keys and values on a GPU, and launches of `cuda/rotate.cu` and `cuda/attention.cu`.

use super::decode::{FEW, Onward, OnwardArgs, Then};
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
    capacity: u32,
    kv_type: u32,
    eps: f32,
    padding: u32,
}

impl RotateArgs {
    fn new(r: &Rotation<'_>, qkv: [&Buffer; 3], cache: &LayerCache, n_tokens: usize) -> RotateArgs {
        let h = cache.heads;
        assert!(2 * r.pairs <= h.key_dim && (r.pairs == 0 || r.tables.is_some()));
        let rows = [h.n_kv_heads * h.group * h.key_dim, h.n_kv_heads * h.key_dim, h.n_kv_heads * h.value_dim];
        let [keys, values] = cache.stores();
        let or_null = |b: Option<&Buffer>, floats: usize| b.map_or(0, |b| b.part(0, 4 * floats));
        RotateArgs {
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
            capacity: cache.capacity as u32,
            kv_type: cache.kind as u32,
            eps: r.eps,
            padding: 0,
        }
    }
}

/// `struct RotateManyArgs`.
#[repr(C)]
struct RotateManyArgs {
    rotation: RotateArgs,
    first_position: u32,
    padding: u32,
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
    let args = RotateManyArgs { rotation: RotateArgs::new(r, qkv, cache, n_tokens), first_position: first_position as u32, padding: 0 };
    let heads = h.n_kv_heads * (h.group + 2);
    let shape = Shape { grid: [heads as u32, n_tokens as u32, 1], threads: 32, shared: 4 * MOST_DIM as u32 };
    // SAFETY: RotateManyArgs; every buffer was checked by `part`, and positions by the assertion.
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
    padding: u32,
}

/// `struct StepArgs`.
#[repr(C)]
struct StepArgs {
    attention: AttentionArgs,
    rotation: RotateArgs,
    onward: OnwardArgs,
    first_position: Address,
    arrived: Address,
}

/// Rows (tokens × query heads of a group) of a warp, warps of a block, and the positions and padding of a tile in shared memory.
const ROWS: usize = 16;
const WARPS: usize = 4;
const TILE: usize = 32;
const PADDING: usize = 8;
/// Positions that a split has at least, and most splits.
const SPLIT_MIN: usize = 256;
const MOST_SPLITS: usize = 64;

impl AttentionArgs {
    fn new(cache: &LayerCache, q: &Buffer, out: &Buffer, n_tokens: usize, window: usize) -> AttentionArgs {
        let (h, heads) = (cache.heads, cache.heads.n_kv_heads * cache.heads.group);
        let [keys, values] = cache.stores();
        AttentionArgs {
            q: q.part(0, 4 * n_tokens * heads * h.key_dim),
            out: out.part(0, 4 * n_tokens * heads * h.value_dim),
            partial: 0,
            keys,
            values,
            n_tokens: n_tokens as u32,
            n_kv_heads: h.n_kv_heads as u32,
            group: h.group as u32,
            key_dim: h.key_dim as u32,
            value_dim: h.value_dim as u32,
            first_position: 0,
            capacity: cache.capacity as u32,
            window: window.min(u32::MAX as usize) as u32,
            kv_type: cache.kind as u32,
            n_splits: 1,
            scale: std::f32::consts::LOG2_E / (h.key_dim as f32).sqrt(),
            padding: 0,
        }
    }
}

/// Dimensions that the kernels are compiled for, of which these heads take one; and a tile's bytes there.
fn compiled(h: Heads) -> (usize, usize) {
    let d = if h.key_dim.max(h.value_dim) <= 64 { 64 } else { MOST_DIM };
    (d, 2 * TILE * (d + PADDING) * 2)
}

/// Attention of tokens `first_position..` over the cache, their own keys and values already in it.
/// `q`, `out`: [token][heads · dim]; `window`: positions a token sees, its own included.
pub fn attention(
    device: &Device,
    cache: &LayerCache,
    q: &Buffer,
    out: &Buffer,
    first_position: usize,
    n_tokens: usize,
    window: usize,
) -> Result<()> {
    let h = cache.heads;
    assert!(n_tokens > 0 && first_position + n_tokens <= cache.capacity);
    let args = AttentionArgs { first_position: first_position as u32, ..AttentionArgs::new(cache, q, out, n_tokens, window) };
    let (d, tile) = compiled(h);
    let name = if d == 64 { "attention_many_64" } else { "attention_many_128" };
    let blocks = (n_tokens * h.group).div_ceil(ROWS * WARPS);
    let shape = Shape { grid: [blocks as u32, h.n_kv_heads as u32, 1], threads: 32 * WARPS as u32, shared: tile as u32 };
    // SAFETY: AttentionArgs; every buffer was checked by `part`, and positions by the assertion.
    unsafe { device.launch(name, shape, &args) }
}

/// Of a step of a few tokens, for all layers: where its tokens begin, and what its blocks leave for each other.
pub struct StepState {
    /// One u32.
    first_position: Buffer,
    /// [split][token][head][value_dim + 2]
    partial: Buffer,
    /// [KV head][block of rows], zeros between launches.
    arrived: Buffer,
}

impl StepState {
    /// Bytes of its buffers.
    pub fn bytes_for(h: Heads) -> [u64; 3] {
        let rows = FEW * h.group;
        let partial = MOST_SPLITS * rows * h.n_kv_heads * (h.value_dim + 2);
        [4, 4 * partial as u64, 4 * (h.n_kv_heads * rows.div_ceil(ROWS)) as u64]
    }

    pub fn new(device: &Device, h: Heads) -> Result<StepState> {
        let [position, partial, arrived] = StepState::bytes_for(h).map(|b| b as usize);
        Ok(StepState {
            first_position: device.allocate("scratch", position)?,
            partial: device.allocate("scratch", partial)?,
            arrived: device.upload("scratch", &vec![0; arrived])?,
        })
    }

    pub fn begin(&self, first_position: usize) -> Result<()> {
        self.first_position.write(0, &(first_position as u32).to_le_bytes())
    }
}

/// Parts of the context that blocks of their own see to, in a step from `first_position` on: the same over ranges of
/// positions, so that a captured launch serves them all.
pub fn splits(first_position: usize, n_tokens: usize, window: usize) -> usize {
    let seen = (first_position + n_tokens).min(window.saturating_add(n_tokens));
    (seen.next_power_of_two() / SPLIT_MIN).clamp(1, MOST_SPLITS)
}

/// A few tokens from where `state` says: `rotate`, then attention, then what `then` says.
/// `qkv` as the projections left them; `out` as of [`attention`]. All positions are within the cache, by the caller.
pub fn attention_step(
    device: &Device,
    r: &Rotation<'_>,
    qkv: [&Buffer; 3],
    cache: &mut LayerCache,
    out: &Buffer,
    state: &StepState,
    n_tokens: usize,
    window: usize,
    n_splits: usize,
    then: Option<Then<'_>>,
) -> Result<()> {
    let h = cache.heads;
    let (rows, heads) = (n_tokens * h.group, h.n_kv_heads * h.group);
    assert!((1..=FEW).contains(&n_tokens) && (1..=MOST_SPLITS).contains(&n_splits));
    let blocks = rows.div_ceil(ROWS);
    let args = StepArgs {
        attention: AttentionArgs {
            partial: state.partial.part(0, 4 * n_splits * n_tokens * heads * (h.value_dim + 2)),
            n_splits: n_splits as u32,
            ..AttentionArgs::new(cache, qkv[0], out, n_tokens, window)
        },
        rotation: RotateArgs::new(r, qkv, cache, n_tokens),
        onward: Onward::take(then, n_tokens, heads * h.value_dim),
        first_position: state.first_position.part(0, 4),
        arrived: state.arrived.part(0, 4 * h.n_kv_heads * blocks),
    };
    let (d, tile) = compiled(h);
    let name = if d == 64 { "attention_step_64" } else { "attention_step_128" };
    let shape = Shape {
        grid: [blocks as u32, h.n_kv_heads as u32, n_splits as u32],
        threads: 32 * WARPS as u32,
        shared: (WARPS * tile.max(ROWS * (d + 2) * 4) + 16) as u32,
    };
    // SAFETY: StepArgs; every buffer was checked by `part` or `Onward::take`, positions by the caller of `begin`.
    unsafe { device.launch(name, shape, &args) }
}

//! The cache of keys and values on a GPU, and launches of `kernels/rotate.cu` and `kernels/attention.cu`.

use crate::decode::{FEW, Onward, OnwardArgs, Then};
use crate::error::{Error, Result};
use crate::{Address, Buffer, Device, Shape, Start};
use kernels::attention::KV_BLOCK;
use std::ops::Range;

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

/// One layer's keys and values: [sequence][n_kv_heads][capacity][dim] of each.
pub struct LayerCache {
    heads: Heads,
    sequences: usize,
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
    pub fn bytes_for(heads: Heads, sequences: usize, capacity: usize, kind: CacheType) -> [usize; 2] {
        [heads.key_dim, heads.value_dim].map(|dim| {
            let (quants, scales) = kind.bytes(sequences * heads.n_kv_heads * capacity * dim);
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

    /// For so many sequences of `capacity` tokens.
    pub fn new(device: &Device, heads: Heads, sequences: usize, capacity: usize, kind: CacheType) -> Result<LayerCache> {
        LayerCache::check(heads, kind)?;
        let [k, v] = LayerCache::bytes_for(heads, sequences, capacity, kind);
        let (keys, values) = (device.allocate("KV cache", k)?, device.allocate("KV cache", v)?);
        Ok(LayerCache { heads, sequences, capacity, kind, keys, values })
    }

    /// Keys and values of these sequences.
    fn stores(&self, sequences: Range<usize>) -> [Store; 2] {
        assert!(sequences.start <= sequences.end && sequences.end <= self.sequences, "sequences {sequences:?} of {}", self.sequences);
        [(&self.keys, self.heads.key_dim), (&self.values, self.heads.value_dim)].map(|(buffer, dim)| {
            let bytes = |n: usize| self.kind.bytes(n * self.heads.n_kv_heads * self.capacity * dim);
            let ((before, scales_before), (quants, scales)) = (bytes(sequences.start), bytes(sequences.len()));
            let all_quants = bytes(self.sequences).0.next_multiple_of(16);
            Store { quants: buffer.part(before, quants), scales: buffer.part(all_quants + scales_before, scales) }
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
    /// Of these rows of `qkv`, which go to the `stores` of `cache`.
    fn new(r: &Rotation<'_>, qkv: [&Buffer; 3], cache: &LayerCache, stores: [Store; 2], tokens: Range<usize>) -> RotateArgs {
        let h = cache.heads;
        assert!(2 * r.pairs <= h.key_dim && (r.pairs == 0 || r.tables.is_some()));
        let rows = [h.n_kv_heads * h.group * h.key_dim, h.n_kv_heads * h.key_dim, h.n_kv_heads * h.value_dim];
        let [keys, values] = stores;
        let or_null = |b: Option<&Buffer>, floats: usize| b.map_or(0, |b| b.part(0, 4 * floats));
        let of_tokens = |b: &Buffer, floats: usize| b.part(4 * tokens.start * floats, 4 * tokens.len() * floats);
        RotateArgs {
            qkv: std::array::from_fn(|i| of_tokens(qkv[i], rows[i])),
            biases: std::array::from_fn(|i| or_null(r.biases[i], rows[i])),
            norms: r.norms.map(|n| or_null(n, h.key_dim)),
            tables: std::array::from_fn(|i| r.tables.map_or(0, |t| of_tokens(t[i], r.pairs))),
            q_scales: r.q_scales.map_or(0, |b| of_tokens(b, 1)),
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

/// Queries are rotated in place, keys and values go to the cache of a sequence from `first_position` on.
/// `qkv`: [token][heads · dim] of each.
pub fn rotate(
    device: &Device,
    r: &Rotation<'_>,
    qkv: [&Buffer; 3],
    cache: &mut LayerCache,
    sequence: usize,
    first_position: usize,
    n_tokens: usize,
) -> Result<()> {
    let h = cache.heads;
    assert!(n_tokens > 0 && first_position + n_tokens <= cache.capacity, "the cache is full");
    let rotation = RotateArgs::new(r, qkv, cache, cache.stores(sequence..sequence + 1), 0..n_tokens);
    let args = RotateManyArgs { rotation, first_position: first_position as u32, padding: 0 };
    let heads = h.n_kv_heads * (h.group + 2);
    const AT_A_TIME: usize = 8;
    let shape = Shape {
        grid: [heads.div_ceil(AT_A_TIME) as u32, n_tokens as u32, 1],
        threads: 32 * AT_A_TIME as u32,
        shared: (4 * AT_A_TIME * MOST_DIM) as u32,
    };
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
    first_token: u32,
}

/// `struct StepArgs`: `places` are of its sequences.
#[repr(C)]
struct StepArgs {
    attention: AttentionArgs,
    rotation: RotateArgs,
    onward: OnwardArgs,
    places: Address,
    arrived: Address,
    blocks: u32,
    all_tokens: u32,
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
    /// Of these rows of `q` and `out`, over the `stores` of `cache`.
    fn new(cache: &LayerCache, stores: [Store; 2], q: &Buffer, out: &Buffer, tokens: Range<usize>, window: usize) -> AttentionArgs {
        let (h, heads) = (cache.heads, cache.heads.n_kv_heads * cache.heads.group);
        let [keys, values] = stores;
        let of_tokens = |b: &Buffer, dim: usize| b.part(4 * tokens.start * heads * dim, 4 * tokens.len() * heads * dim);
        AttentionArgs {
            q: of_tokens(q, h.key_dim),
            out: of_tokens(out, h.value_dim),
            partial: 0,
            keys,
            values,
            n_tokens: tokens.len() as u32,
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
            first_token: 0,
        }
    }
}

/// Dimensions that the kernels are compiled for, of which these heads take one; and a tile's bytes there.
fn compiled(h: Heads) -> (usize, usize) {
    let d = if h.key_dim.max(h.value_dim) <= 64 { 64 } else { MOST_DIM };
    (d, 2 * TILE * (d + PADDING) * 2)
}

/// Attention of tokens `first_position..` of a sequence over its cache, their own keys and values already in it.
/// `q`, `out`: [token][heads · dim]; `window`: positions a token sees, its own included.
pub fn attention(
    device: &Device,
    cache: &LayerCache,
    sequence: usize,
    q: &Buffer,
    out: &Buffer,
    first_position: usize,
    n_tokens: usize,
    window: usize,
) -> Result<()> {
    let h = cache.heads;
    assert!(n_tokens > 0 && first_position + n_tokens <= cache.capacity);
    let stores = cache.stores(sequence..sequence + 1);
    let args = AttentionArgs { first_position: first_position as u32, ..AttentionArgs::new(cache, stores, q, out, 0..n_tokens, window) };
    let (d, tile) = compiled(h);
    let name = if d == 64 { "attention_many_64" } else { "attention_many_128" };
    let blocks = (n_tokens * h.group).div_ceil(ROWS * WARPS);
    let shape = Shape { grid: [blocks as u32, h.n_kv_heads as u32, 1], threads: 32 * WARPS as u32, shared: 2 * tile as u32 };
    // SAFETY: AttentionArgs; every buffer was checked by `part`, and positions by the assertion.
    unsafe { device.launch(name, shape, &args) }
}

/// Of a step, for all layers: where its tokens belong, and what its blocks leave for each other.
pub struct StepState {
    /// [sequence of the step] `struct Place`.
    places: Buffer,
    /// [split][token][head][value_dim + 2]
    partial: Buffer,
    /// [KV head][block of rows], zeros between launches.
    arrived: Buffer,
}

impl StepState {
    /// Bytes of its buffers, of steps that `sequences` take part in at most.
    pub fn bytes_for(h: Heads, sequences: usize) -> [u64; 3] {
        let partial = MOST_SPLITS * FEW * h.group * h.n_kv_heads * (h.value_dim + 2);
        // A block's rows are of one sequence.
        let blocks = h.n_kv_heads * FEW * h.group.div_ceil(ROWS);
        [8 * sequences as u64, 4 * partial as u64, 4 * blocks as u64]
    }

    pub fn new(device: &Device, h: Heads, sequences: usize) -> Result<StepState> {
        let [places, partial, arrived] = StepState::bytes_for(h, sequences).map(|b| b as usize);
        Ok(StepState {
            places: device.allocate("scratch", places)?,
            partial: device.allocate("scratch", partial)?,
            arrived: device.upload("scratch", &vec![0; arrived])?,
        })
    }

    /// The sequences that take part, and the position of the first token of each.
    pub fn begin(&self, places: impl Iterator<Item = (usize, usize)>) -> Result<()> {
        let bytes: Vec<u8> = places.flat_map(|(s, at)| [s as u32, at as u32]).flat_map(u32::to_le_bytes).collect();
        self.places.write(0, &bytes)
    }
}

/// What takes part in a launch of [`attention_step`].
#[derive(Debug, Clone)]
pub struct StepPart {
    /// Of those that [`StepState::begin`] was told of.
    pub sequences: Range<usize>,
    /// Tokens of each; of all together, [`FEW`] at most.
    pub each: usize,
    /// Positions that a token sees, its own included.
    pub window: usize,
    /// See [`splits`].
    pub n_splits: usize,
}

/// Parts of the context that blocks of their own see to, in a step from `first_position` on (of several sequences, the
/// largest): the same over ranges of positions, so that a captured launch serves them all.
pub fn splits(first_position: usize, n_tokens: usize, window: usize) -> usize {
    let seen = (first_position + n_tokens).min(window.saturating_add(n_tokens));
    (seen.next_power_of_two() / SPLIT_MIN).clamp(1, MOST_SPLITS)
}

/// A few tokens from where `state` says: `rotate`, then attention, then what `then` says.
/// `qkv` as the projections left them, `out` as of [`attention`], both of all sequences that `state` was told of.
/// All sequences and positions are within the cache, by the caller of `begin`.
pub fn attention_step(
    device: &Device,
    r: &Rotation<'_>,
    qkv: [&Buffer; 3],
    cache: &mut LayerCache,
    out: &Buffer,
    state: &StepState,
    part: &StepPart,
    then: Option<Then<'_>>,
) -> Result<()> {
    let h = cache.heads;
    let (n_sequences, heads) = (part.sequences.len(), h.n_kv_heads * h.group);
    let n_tokens = n_sequences * part.each;
    let tokens = part.sequences.start * part.each..part.sequences.end * part.each;
    assert!((1..=FEW).contains(&n_tokens) && (1..=MOST_SPLITS).contains(&part.n_splits));
    let blocks_each = (part.each * h.group).div_ceil(ROWS);
    let blocks = n_sequences * blocks_each;
    let stores = cache.stores(0..cache.sequences);
    let args = StepArgs {
        attention: AttentionArgs {
            partial: state.partial.part(0, 4 * part.n_splits * n_tokens * heads * (h.value_dim + 2)),
            n_splits: part.n_splits as u32,
            n_tokens: part.each as u32,
            ..AttentionArgs::new(cache, stores, qkv[0], out, tokens.clone(), part.window)
        },
        rotation: RotateArgs::new(r, qkv, cache, stores, tokens),
        onward: Onward::take(then, n_tokens, heads * h.value_dim),
        places: state.places.part(8 * part.sequences.start, 8 * n_sequences),
        arrived: state.arrived.part(0, 4 * h.n_kv_heads * blocks),
        blocks: blocks_each as u32,
        all_tokens: n_tokens as u32,
    };
    let (d, tile) = compiled(h);
    let name = if d == 64 { "attention_step_64" } else { "attention_step_128" };
    let shape = Shape {
        grid: [blocks as u32, h.n_kv_heads as u32, part.n_splits as u32],
        threads: 32 * WARPS as u32,
        shared: (WARPS * tile.max(ROWS * (d + 2) * 4) + 16) as u32,
    };
    // SAFETY: StepArgs; every buffer was checked by `part` or `Onward::take`, places by the caller of `begin`.
    unsafe { device.launch_at(name, shape, Start::Early, &args) }
}

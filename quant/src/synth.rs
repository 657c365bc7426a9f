//! Models with random weights in named shapes, written straight in the type
//! asked for: for capacity and speed work where no checkpoint of the size is
//! at hand. Each tensor's blocks are drawn from a pool of encoded Gaussian
//! weights, so writing runs at the disk's speed.

use crate::convert::Progress;
use crate::error::{Error, Result};
use crate::mix::{self, Mix};
use gguf::blocks::F32;
use gguf::{Array, BlockType, Hparams, Layout, Metadata, Value, Writer};
use std::collections::HashMap;
use std::path::Path;

/// One row of the table of shapes.
pub struct Shape {
    pub name: &'static str,
    pub arch: &'static str,
    pub layers: u32,
    pub hidden: u32,
    pub ffn: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub vocab: u32,
    pub context: u32,
    pub experts: u32,
}

const fn shape(name: &'static str, dims: [u32; 7], vocab: u32, context: u32) -> Shape {
    let [layers, hidden, ffn, heads, kv_heads, head_dim, experts] = dims;
    Shape { name, arch: "llama", layers, hidden, ffn, heads, kv_heads, head_dim, vocab, context, experts }
}

/// Layers, hidden, feed-forward, heads, key/value heads, head size, experts; vocabulary; context.
pub static SHAPES: &[Shape] = &[
    shape("tiny", [2, 256, 512, 4, 2, 64, 0], 512, 2048),
    shape("tiny-moe", [4, 256, 512, 4, 1, 64, 8], 512, 2048),
    shape("1b", [16, 2048, 8192, 32, 8, 64, 0], 32_000, 32_768),
    shape("mistral-7b", [32, 4096, 14_336, 32, 8, 128, 0], 32_768, 32_768),
    shape("ministral-8b", [36, 4096, 12_288, 32, 8, 128, 0], 131_072, 131_072),
    shape("mistral-22b", [56, 6144, 16_384, 48, 8, 128, 0], 32_768, 131_072),
    shape("mistral-24b", [40, 5120, 32_768, 32, 8, 128, 0], 131_072, 131_072),
    shape("mixtral-tiny", [4, 1024, 3584, 16, 4, 64, 8], 32_000, 32_768),
    shape("mixtral-8x7b", [32, 4096, 14_336, 32, 8, 128, 8], 32_000, 32_768),
    shape("mixtral-8x22b", [56, 6144, 16_384, 48, 8, 128, 8], 32_768, 65_536),
    shape("llama-70b", [80, 8192, 28_672, 64, 8, 128, 0], 128_256, 131_072),
];

pub fn by_name(name: &str) -> Result<&'static Shape> {
    SHAPES
        .iter()
        .find(|s| s.name == name)
        .ok_or_else(|| Error::UnknownShape { name: name.to_owned(), known: SHAPES.iter().map(|s| s.name).collect::<Vec<_>>().join(", ") })
}

impl Shape {
    /// The file this shape becomes in a mix, without its weights.
    pub fn layout(&self, mix: &Mix) -> Result<Layout> {
        let mut m = Metadata::new();
        let key = |k: &str| format!("{}.{k}", self.arch);
        m.set_str("general.architecture", self.arch);
        m.set_str("general.name", format!("synth {}", self.name));
        m.set_u32("general.file_type", mix.file_type);
        m.set_u32("general.quantization_version", 2);
        for (k, v) in [
            ("block_count", self.layers),
            ("context_length", self.context),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("vocab_size", self.vocab),
        ] {
            m.set_u32(key(k), v);
        }
        m.set_f32(key("attention.layer_norm_rms_epsilon"), 1e-5);
        m.set_f32(key("rope.freq_base"), 1_000_000.0);
        if self.experts > 0 {
            m.set_u32(key("expert_count"), self.experts);
            m.set_u32(key("expert_used_count"), 2);
        }
        tokenizer(self.vocab, &mut m);
        let h = Hparams::from_metadata(&m)?;
        let mut tensors = Vec::new();
        let rules: Vec<_> = h.arch.rules().filter(|r| r.wanted(&h) != Some(false)).collect();
        let is_there = |r: &gguf::arch::TensorRule| r.wanted(&h).is_some() || r.role == gguf::arch::Role::Output;
        let edges = rules.iter().filter(|r| !r.per_layer()).map(|r| (*r, 0));
        let layers = (0..h.n_layers).flat_map(|l| rules.iter().filter(|r| r.per_layer()).map(move |r| (*r, l)));
        for (rule, layer) in edges.chain(layers).filter(|(r, _)| is_there(r)) {
            let (name, dims) = (rule.gguf_name(layer), rule.dims(&h));
            let block: &BlockType =
                if mix::is_quantizable(&name, dims.len()) { mix.type_of(&name, dims[0], &h, false, false) } else { &F32 };
            tensors.push((name, dims, block));
        }
        Ok(Layout::new(m, tensors)?)
    }
}

/// A SentencePiece vocabulary of bytes and made-up words, which any reader accepts.
fn tokenizer(vocab: u32, m: &mut Metadata) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend((tokens.len()..vocab as usize).map(|i| format!("▁t{i}")));
    tokens.truncate(vocab as usize);
    let types = (0..tokens.len())
        .map(|i| match i {
            0 => 2,
            1 | 2 => 3,
            3..=258 => 6,
            _ => 1,
        })
        .collect();
    let scores = (0..tokens.len()).map(|i| -(i as f32)).collect();
    m.set_str("tokenizer.ggml.model", "llama");
    m.set_str("tokenizer.ggml.pre", "default");
    m.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    m.set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    m.set_u32("tokenizer.ggml.bos_token_id", 1);
    m.set_u32("tokenizer.ggml.eos_token_id", 2);
    m.set_u32("tokenizer.ggml.unknown_token_id", 0);
    m.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    m.set("tokenizer.ggml.add_eos_token", Value::Bool(false));
}

/// SplitMix64 (Steele, Lea and Flood 2014): enough for weights nobody will read.
pub struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f32 {
        ((-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
}

/// Weights in the pool: a multiple of every block, large enough that rows differ.
const POOL: usize = 1 << 20;

/// Writes the file. The same shape, mix and seed give the same bytes.
pub fn write(shape: &Shape, mix: &Mix, target: &Path, seed: u64, progress: &dyn Progress) -> Result<()> {
    let mut random = Random(seed);
    let gaussian: Vec<f32> = (0..POOL).map(|_| random.normal()).collect();
    let mut pools: HashMap<(u32, u64), Vec<u8>> = HashMap::new();
    let mut writer = Writer::create(target, shape.layout(mix)?)?;
    for t in writer.layout().tensors().to_vec() {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        if t.dims().len() == 1 {
            writer.write(&1.0f32.to_le_bytes().repeat(t.n_elements() as usize))?;
            continue;
        }
        let (block, cols) = (t.block(), t.row_len());
        let encode = kernels::encode::encoder(block).ok_or(gguf::Error::CannotEncode { type_name: block.name })?;
        // Standard deviation 1/√cols keeps activations near unit size through the layers.
        let pool = pools.entry((block.id, cols)).or_insert_with(|| {
            let scale = 1.0 / (cols as f32).sqrt();
            let x: Vec<f32> = gaussian.iter().map(|v| v * scale).collect();
            let mut out = vec![0u8; block.bytes_for(POOL as u64) as usize];
            encode(&x, None, &mut out);
            out
        });
        let mut left = t.n_bytes();
        while left > 0 {
            // A long run from a random block: rows differ, and copying stays cheap.
            let blocks = pool.len() / block.block_bytes;
            let start = (random.next_u64() % (blocks as u64 / 2)) as usize * block.block_bytes;
            let n = (pool.len() - start).min(left as usize);
            writer.write(&pool[start..start + n])?;
            left -= n as u64;
        }
        progress.advanced(t.name(), t.n_elements());
    }
    writer.finish()?;
    Ok(())
}

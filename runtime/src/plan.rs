//! Memory before it is taken: weights, KV cache and scratch of each device,
//! from the header alone. The sums are those the runtime allocates by.

use crate::decoder::{BATCH, Scratch};
use crate::kv_cache::KvType;
use gguf::{Hparams, TensorInfo};

#[derive(Debug, Clone)]
pub struct Device {
    pub name: String,
    /// Bytes that may be used.
    pub budget: u64,
    pub weights: u64,
    pub kv: u64,
    pub scratch: u64,
}

impl Device {
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch
    }
}

#[derive(Debug, Clone)]
pub struct MemoryPlan {
    pub fits: bool,
    /// Largest context that fits; 0 if not even one token does.
    pub max_ctx: u64,
    pub ctx: u64,
    pub devices: Vec<Device>,
}

/// What a process has beside the model: code, tables, a tokenizer.
const PROCESS: u64 = 64 << 20;
/// What the driver keeps on a GPU for itself.
const GPU_CONTEXT: u64 = 512 << 20;

pub struct Request {
    /// 0: the model's own context, or as much as fits if that is less.
    pub ctx: u64,
    pub kv: KvType,
    pub ram: u64,
    /// Plan for a GPU of this size.
    pub vram: Option<u64>,
}

/// Bytes that a GPU of `vram` bytes has for weights beside a context of `ctx` tokens and scratch; 0 if none.
pub fn room_for_weights(h: &Hparams, vram: u64, ctx: u64, kv: KvType) -> u64 {
    vram.saturating_sub(GPU_CONTEXT + kv.bytes(h.kv_elements_per_token()) * ctx + Scratch::bytes(h, BATCH))
}

/// Plans for one device: the GPU if `vram` is given (the embedding stays on the host), else the CPU.
pub fn plan(h: &Hparams, tensors: &[TensorInfo], r: &Request) -> MemoryPlan {
    let all: u64 = tensors.iter().map(TensorInfo::n_bytes).sum();
    let tied = !tensors.iter().any(|t| t.name() == "output.weight");
    let embedding: u64 = tensors.iter().filter(|t| t.name() == "token_embd.weight").map(TensorInfo::n_bytes).sum();
    let kv = |ctx: u64| r.kv.bytes(h.kv_elements_per_token()) * ctx;
    let scratch = Scratch::bytes(h, BATCH);
    let own = h.context_length;
    let (name, budget, weights, fixed) = match r.vram {
        None => ("cpu", r.ram, all, scratch + PROCESS),
        Some(vram) => ("gpu", vram.saturating_sub(GPU_CONTEXT), if tied { all } else { all - embedding }, scratch),
    };
    let room = budget.saturating_sub(weights + fixed);
    let max_ctx = if budget < weights + fixed { 0 } else { (room / kv(1).max(1)).min(own) };
    let ctx = if r.ctx == 0 { max_ctx.clamp(1, own) } else { r.ctx };
    let mut devices = vec![Device { name: name.into(), budget, weights, kv: kv(ctx), scratch: fixed }];
    let fits = devices[0].total() <= budget;
    if r.vram.is_some() {
        let host = if tied { 0 } else { embedding };
        devices.push(Device { name: "cpu".into(), budget: r.ram, weights: host, kv: 0, scratch: PROCESS });
    }
    MemoryPlan { fits: fits && devices.iter().all(|d| d.total() <= d.budget), max_ctx, ctx, devices }
}

//! Memory before it is taken: weights, KV cache and scratch of each device,
//! from the header alone. The sums are those the runtime allocates by.

use crate::decoder::{BATCH, Scratch};
use crate::error::{Error, Result};
use crate::gpu::{self, Split};
use crate::kv_cache::{CacheShape, KvType};
use gguf::limits::MAX_CONTEXT;
use gguf::{Hparams, TensorInfo};
use kernels::{ActivationFormat, matmul};

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
    /// On the device planned for, every layer of it (the embedding of a GPU's model lies on the host, and so many of
    /// its experts as the GPU has no room for).
    pub fits: bool,
    /// Largest context with which it does; 0 if not even one token does.
    pub max_ctx: u64,
    pub ctx: u64,
    pub devices: Vec<Device>,
    /// Layers whose experts lie on the GPU that is planned for, of a model that has any.
    pub gpu_expert_layers: Option<u64>,
    /// A model that does not fit a GPU whole: as many layers as it holds, the others on the CPU.
    pub split: Option<SplitPlan>,
}

#[derive(Debug, Clone)]
pub struct SplitPlan {
    pub gpu_layers: u64,
    pub devices: Vec<Device>,
}

/// What a process has beside the model: code, tables, a tokenizer.
const PROCESS: u64 = 64 << 20;
/// What the driver keeps on a GPU for itself.
const GPU_CONTEXT: u64 = 512 << 20;

pub struct Request {
    /// Tokens of each sequence; 0: the model's own context, or as much as fits if that is less.
    pub ctx: u64,
    /// Side by side.
    pub sequences: u64,
    pub kv: KvType,
    pub ram: u64,
    /// Plan for a GPU of this size.
    pub vram: Option<u64>,
}

impl Request {
    fn cache(&self, ctx: u64) -> CacheShape {
        CacheShape { sequences: self.sequences as usize, context: ctx as usize, kv: self.kv }
    }
}

/// Bytes that may be allocated on a GPU of `vram` bytes.
pub fn gpu_budget(vram: u64) -> u64 {
    vram.saturating_sub(GPU_CONTEXT)
}

/// Bytes that a GPU of `vram` bytes has for `n_tensors` quantized weights beside a context of `ctx` tokens and scratch; 0 if none.
pub fn room_for_weights(h: &Hparams, n_tensors: usize, vram: u64, ctx: u64, kv: KvType) -> Result<u64> {
    Ok(gpu_budget(vram).saturating_sub(gpu::beside_weights(h, n_tensors, CacheShape::one(checked(ctx)? as usize, kv))?))
}

fn checked(ctx: u64) -> Result<u64> {
    if ctx > MAX_CONTEXT {
        return Err(Error::BadOption { what: "the context", value: ctx.to_string(), rule: "at most 134217728 tokens" });
    }
    Ok(ctx)
}

/// Largest number of tokens up to `most` that fits; 0 if not even one does. `fits` holds up to some number only.
fn largest(most: u64, fits: impl Fn(u64) -> Result<bool>) -> Result<u64> {
    let (mut fitting, mut too_many) = (0, most.max(1) + 1);
    while fitting + 1 < too_many {
        let middle = fitting + (too_many - fitting) / 2;
        match fits(middle)? {
            true => fitting = middle,
            false => too_many = middle,
        }
    }
    Ok(fitting)
}

struct Model<'a> {
    h: &'a Hparams,
    tensors: &'a [TensorInfo],
    request: &'a Request,
}

impl Model<'_> {
    /// Bytes that the host's caches take for so many layers.
    fn kv(&self, layers: u64, ctx: u64) -> u64 {
        self.request.kv.bytes(self.h.kv_elements_per_token() / self.h.n_layers) * layers * self.request.sequences * ctx
    }

    /// What the matrices want their inputs in.
    fn formats(&self) -> Vec<ActivationFormat> {
        let asks = |t: &TensorInfo, f| t.dims().len() > 1 && matmul::choose(t.block()).is_ok_and(|k| k.activation() == f);
        ActivationFormat::ALL.into_iter().filter(|f| self.tensors.iter().any(|t| asks(t, *f))).collect()
    }

    fn cpu(&self, ctx: u64) -> Device {
        Device {
            name: "cpu".into(),
            budget: self.request.ram,
            weights: self.tensors.iter().map(TensorInfo::n_bytes).sum(),
            kv: self.kv(self.h.n_layers, ctx),
            scratch: Scratch::bytes(self.h, &self.formats(), BATCH) + PROCESS,
        }
    }

    /// A GPU with every layer but the split's, and the host beside it.
    fn gpu(&self, vram: u64, ctx: u64, split: Split) -> Result<Vec<Device>> {
        let (h, r) = (self.h, self.request);
        let needs = gpu::needs(h, self.tensors, r.cache(ctx), split)?;
        let host_runs = split.uses_host(h);
        let gpu = Device {
            name: "gpu".into(),
            budget: gpu_budget(vram),
            weights: needs.weights,
            kv: needs.kv,
            scratch: needs.peak() - needs.weights - needs.kv,
        };
        let host = Device {
            name: "cpu".into(),
            budget: r.ram,
            weights: gpu::host_bytes(h, self.tensors, split),
            kv: self.kv(split.on_host as u64, ctx),
            scratch: PROCESS + if host_runs { Scratch::bytes(h, &self.formats(), BATCH) } else { 0 },
        };
        Ok(vec![gpu, host])
    }
}

/// Plans for one device: the GPU if `vram` is given (the embedding, and experts, stay on the host), else the CPU.
pub fn plan(h: &Hparams, tensors: &[TensorInfo], r: &Request) -> Result<MemoryPlan> {
    if r.sequences == 0 || checked(r.sequences).is_err() {
        return Err(Error::BadOption { what: "the number of sequences", value: r.sequences.to_string(), rule: "at least 1" });
    }
    let m = Model { h, tensors, request: r };
    // Every layer on the GPU, and as many of their experts as it has room for.
    let whole = |vram, ctx| -> Result<Split> {
        let best = gpu::best_split(h, tensors, r.cache(ctx), gpu_budget(vram))?;
        Ok(best.filter(|s| s.on_host == 0).unwrap_or(Split::without_experts(h, 0)))
    };
    // Layers whose experts are on the GPU, if that can be said, and what each device holds.
    let placed = |ctx| -> Result<(Option<u64>, Vec<Device>)> {
        let Some(vram) = r.vram else { return Ok((None, vec![m.cpu(ctx)])) };
        let split = whole(vram, ctx)?;
        Ok(((h.n_experts > 0).then(|| split.expert_layers(h) as u64), m.gpu(vram, ctx, split)?))
    };
    let fits = |devices: &[Device]| devices.iter().all(|d| d.total() <= d.budget);
    let max_ctx = largest(h.context_length.min(MAX_CONTEXT / r.sequences), |ctx| Ok(fits(&placed(ctx)?.1)))?;
    let own = if max_ctx == 0 && r.vram.is_some() { h.context_length.min(4096) } else { max_ctx.max(1) };
    let ctx = if r.ctx == 0 { own } else { checked(r.ctx.saturating_mul(r.sequences))? / r.sequences };
    let (gpu_expert_layers, devices) = placed(ctx)?;
    let mut plan = MemoryPlan { fits: fits(&devices), max_ctx, ctx, devices, gpu_expert_layers, split: None };
    if let (false, Some(vram)) = (plan.fits, r.vram)
        && let Some(split) = gpu::best_split(h, tensors, r.cache(ctx), gpu_budget(vram))?
    {
        let devices = m.gpu(vram, ctx, split)?;
        if fits(&devices) {
            plan.split = Some(SplitPlan { gpu_layers: h.n_layers - split.on_host as u64, devices });
        }
    }
    Ok(plan)
}

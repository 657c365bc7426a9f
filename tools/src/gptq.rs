//! `--method gptq`: quantizer and runtime in turn, layer by layer, so that each
//! matrix is rounded by the inputs that the quantized layers below it give.
//!
//! ```text
//! for each layer:  windows ─ layer as it is ─▶ second moments ─▶ round ─▶ file
//!                  windows ─ layer as rounded ─▶ windows of the next layer
//! ```

use crate::commands::calibrate::SOURCE_TYPE;
use crate::common;
use anyhow::{Context, Result, bail};
use kernels::Pool;
use quant::Plan;
use quant::convert::{Progress, Stepwise};
use quant::encode::gptq::{Gathered, Moments, Whole};
use quant::statistics::MIN_TOKENS;
use runtime::layerwise::Layerwise;
use runtime::{Model, Weight};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

/// Bytes of each tensor of a layer, and its type.
type Rounded = HashMap<String, (&'static gguf::BlockType, Vec<u8>)>;

/// Writes `plan`, of `src`, into `target`; returns the seconds it took. `memory`: what the encoders take, and the most there may be.
pub fn quantize(src: &Path, plan: &Plan, target: &Path, threads: usize, memory: (u64, u64)) -> Result<f64> {
    let calibration = plan.calibration().context("--method gptq wants --calibration STATS")?;
    let stats = calibration.statistics.path();
    let Some((tokens, context)) = calibration.statistics.tokens() else {
        bail!("{} does not hold the tokens it was made from; make it with this version of `grist calibrate`", stats.display());
    };
    let model = Model::open(&common::model_path_as(src, SOURCE_TYPE)?)?;
    let h = model.hparams();
    if tokens.iter().any(|t| *t as usize >= model.vocab()) || context < 2 {
        bail!("{} holds tokens that this model does not have; it is another model's", stats.display());
    }
    let widest = h.hidden.max(h.ffn).max(h.expert_ffn).max(h.n_heads * h.value_dim) as usize;
    let needed = memory.0 + Moments::bytes(h) + Whole::bytes(widest) + Layerwise::memory_bytes(h, context);
    if needed > memory.1 {
        bail!(
            "gptq needs {} of memory for this model, --max-memory allows {}; allow more, or use --method hessian",
            common::show_bytes(needed),
            common::show_bytes(memory.1)
        );
    }
    for note in &plan.notes {
        eprintln!("grist: note: {note}");
    }
    let pool = Pool::new(threads);
    let mut layers = Layerwise::new(&model, &tokens, context, common::folder_of(target))?;
    let mut conversion = Stepwise::begin(plan, target, threads)?;
    let moments = Mutex::new(Moments::new(h));
    let weights = plan.total_weights();
    let bar = common::Bar::new(weights, plan.source_bytes() as f64 / weights.max(1) as f64);

    for t in plan.layout().tensors().iter().filter(|t| !is_rounded_by_layer(t.name())) {
        conversion.tensor(t.name(), &[], &bar)?;
    }
    for l in 0..h.n_layers as usize {
        lock(&moments).begin(l as u64);
        layers.observe(&pool, l, &moments, || ())?;
        let gathered = lock(&moments).take();
        let rounded = round_layer(&mut conversion, plan, gathered, &bar)?;
        let stand_in = |w: &Weight| -> Result<Option<Weight>> {
            let (tensor, part) = w.tensor();
            let Some((block, bytes)) = rounded.get(tensor) else { return Ok(None) };
            let n = w.plan().rows() * block.bytes_for(w.plan().cols() as u64) as usize;
            Ok(Some(w.with_bytes(block, bytes[part * n..(part + 1) * n].to_vec())?))
        };
        layers.advance(&pool, l, stand_in, || ())?;
    }
    conversion.finish()?;
    bar.finish();
    Ok(bar.seconds())
}

fn lock(moments: &Mutex<Moments>) -> std::sync::MutexGuard<'_, Moments> {
    moments.lock().unwrap_or_else(|e| e.into_inner())
}

/// The matrices of layers, whose inputs are gathered.
fn is_rounded_by_layer(tensor: &str) -> bool {
    tensor.starts_with("blk.") && quant::mix::is_quantizable(tensor, 2)
}

fn round_layer(conversion: &mut Stepwise, plan: &Plan, gathered: Vec<Gathered>, progress: &dyn Progress) -> Result<Rounded> {
    let mut rounded = Rounded::new();
    for g in gathered {
        let factors = |(sums, seen): (Vec<f32>, u64)| (seen >= MIN_TOKENS).then(|| conversion.factors(sums, g.cols));
        let wholes: Vec<Option<Whole>> = g.parts.into_iter().map(factors).collect();
        for tensor in g.tensors {
            let info = plan.layout().tensors().iter().find(|t| t.name() == tensor).with_context(|| format!("no tensor '{tensor}'"))?;
            let bytes = conversion.tensor(&tensor, &wholes, progress)?;
            rounded.insert(tensor, (info.block(), bytes));
        }
    }
    Ok(rounded)
}

//! Perplexity by llama.cpp's protocol, so that figures compare: the text is
//! tokenized once with BOS, cut into windows of `ctx` tokens, the first token
//! of each replaced by BOS, and the second half of each window scored. With a
//! reference, the divergence KL(reference ‖ model) of every scored position,
//! both models side by side, no logits file.

use crate::decoder::Want;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gpu::Target;
use crate::kv_cache::{CacheShape, KvType};
use crate::layers::per_token;
use crate::model::Model;
use crate::tokenizer::{EncodeOptions, Tokenizer};
use cuda::Device;
use kernels::{Pool, vecmath};

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub perplexity: f64,
    /// Standard error of the perplexity.
    pub perplexity_error: f64,
    pub windows: usize,
    pub scored: usize,
    pub divergence: Option<Divergence>,
}

#[derive(Debug, Clone, Default)]
pub struct Divergence {
    pub reference_perplexity: f64,
    /// Nats.
    pub mean: f64,
    pub standard_error: f64,
    pub median: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// Share of positions where both models' likeliest token is the same.
    pub top1_agreement: f64,
    /// Root mean square change of the probability of the token that came.
    pub rms_probability_change: f64,
}

pub struct Options {
    pub context: usize,
    /// 0: all.
    pub max_windows: usize,
    /// Of the model; the reference keeps f16.
    pub kv: KvType,
    /// A GPU for both; None: the CPU.
    pub device: Option<Device>,
}

/// ln p of each token, from logits in place.
pub(crate) fn log_softmax(logits: &mut [f32]) {
    let mut e = logits.to_vec();
    let max = e.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let total = vecmath::exp_minus_max(&mut e);
    let shift = max + total.ln() as f32;
    logits.iter_mut().for_each(|v| *v -= shift);
}

/// KL(q ‖ p) of two rows of log-probabilities, in nats.
pub(crate) fn kl_divergence(q: &[f32], p: &[f32]) -> f64 {
    q.iter().zip(p).map(|(q, p)| f64::from(q.exp()) * f64::from(q - p)).sum()
}

fn argmax(x: &[f32]) -> usize {
    x.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b }).0
}

/// Σ, Σ², n of a sample.
#[derive(Default)]
struct Moments {
    n: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1.0;
        self.sum += x;
        self.squares += x * x;
    }

    fn mean(&self) -> f64 {
        self.sum / self.n
    }

    fn standard_error(&self) -> f64 {
        ((self.squares / self.n - self.mean().powi(2)).max(0.0) / (self.n - 1.0).max(1.0)).sqrt()
    }
}

/// Log-probabilities at positions `first..` of the window.
fn log_probabilities(engine: &mut Engine, pool: &Pool, tokens: &[u32], first: usize) -> Result<Vec<f32>> {
    engine.truncate(0, 0);
    let vocab = engine.model().vocab();
    let mut logits = engine.forward(pool, 0, tokens, Want::From(first))?.to_vec();
    per_token(pool, &mut logits, vocab, |_, row| log_softmax(row));
    Ok(logits)
}

/// The text's windows, of which there are at most `max` if that is not 0.
pub fn windows(model: &Model, text: &str, context: usize, max: usize) -> Result<Vec<Vec<u32>>> {
    let tokenizer = Tokenizer::from_metadata(model.file().metadata())?;
    let tokens = tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: false })?;
    if context < 4 || tokens.len() < context {
        return Err(Error::TextTooShort { tokens: tokens.len(), needed: context.max(4) });
    }
    let mut windows: Vec<Vec<u32>> =
        tokens.chunks_exact(context).take(if max == 0 { usize::MAX } else { max }).map(<[u32]>::to_vec).collect();
    if let (true, Some(bos)) = (tokenizer.add_bos, tokenizer.bos) {
        windows.iter_mut().for_each(|w| w[0] = bos);
    }
    Ok(windows)
}

pub fn run(
    pool: &Pool,
    model: &Model,
    reference: Option<&Model>,
    text: &str,
    options: &Options,
    mut progress: impl FnMut(usize, usize, f64),
) -> Result<Report> {
    if let Some(r) = reference
        && r.vocab() != model.vocab()
    {
        return Err(Error::DifferentVocabularies { a: model.vocab(), b: r.vocab() });
    }
    let ctx = options.context;
    let windows = windows(model, text, ctx, options.max_windows)?;
    let n_windows = windows.len();
    let device = options.device.as_ref().map(Target::from);
    let mut engine = Engine::new(model, device, CacheShape::one(ctx, options.kv))?;
    let mut reference = reference.map(|r| Engine::new(r, device, CacheShape::one(ctx, KvType::F16))).transpose()?;
    let (mut nll, mut reference_nll, mut kl, mut change) = (Moments::default(), Moments::default(), Moments::default(), Moments::default());
    let mut divergences = Vec::new();
    let mut same_top = 0usize;
    let (first, vocab) = (ctx / 2, model.vocab());
    for (w, window) in windows.into_iter().enumerate() {
        let ours = log_probabilities(&mut engine, pool, &window, first)?;
        let theirs = reference.as_mut().map(|r| log_probabilities(r, pool, &window, first)).transpose()?;
        for i in 0..ctx - 1 - first {
            let (p, next) = (&ours[i * vocab..(i + 1) * vocab], window[first + i + 1] as usize);
            nll.add(-f64::from(p[next]));
            if let Some(theirs) = &theirs {
                let q = &theirs[i * vocab..(i + 1) * vocab];
                reference_nll.add(-f64::from(q[next]));
                let d = kl_divergence(q, p);
                kl.add(d);
                divergences.push(d);
                same_top += usize::from(argmax(p) == argmax(q));
                change.add((f64::from(p[next]).exp() - f64::from(q[next]).exp()).powi(2));
            }
        }
        progress(w + 1, n_windows, nll.mean().exp());
    }
    let perplexity = nll.mean().exp();
    let divergence = (kl.n > 0.0).then(|| {
        divergences.sort_by(f64::total_cmp);
        let at = |share: f64| divergences[((divergences.len() - 1) as f64 * share).round() as usize];
        Divergence {
            reference_perplexity: reference_nll.mean().exp(),
            mean: kl.mean(),
            standard_error: kl.standard_error(),
            median: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
            top1_agreement: same_top as f64 / kl.n,
            rms_probability_change: change.mean().sqrt(),
        }
    });
    Ok(Report { perplexity, perplexity_error: perplexity * nll.standard_error(), windows: n_windows, scored: nll.n as usize, divergence })
}

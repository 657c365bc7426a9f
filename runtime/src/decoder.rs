//! The decoder: embedding, layers, final norm, head, over a batch of tokens.
//! A long prompt passes in batches, so scratch memory does not grow with it.

use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::layers::{Quantized, attention, feed_forward};
use crate::model::{Model, Weight};
use gguf::arch::Dim;
use gguf::{Hparams, RopeScaling};
use kernels::attention::Partials;
use kernels::matmul::activation::SURELY_IN_PANELS;
use kernels::vecmath::{self, RopeTable};
use kernels::{ActivationFormat, Observer, Pool};
use std::sync::Mutex;

/// Tokens that pass through the layers together.
pub const BATCH: usize = 512;

/// Tokens of a batch that pass all of the last layer, wanted or not: so many are multiplied as the others were.
pub(crate) const LEAST_KEPT: usize = SURELY_IN_PANELS;

/// Which logits a caller needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Of the last token.
    Last,
    /// Of every token from this index of the given tokens on.
    From(usize),
}

/// Tokens that pass through the layers together: as many of each of some sequences, one sequence after the other.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// None twice.
    pub sequences: &'a [usize],
    pub tokens: &'a [u32],
}

impl Batch<'_> {
    /// Tokens of each sequence.
    pub fn each(self) -> usize {
        self.tokens.len() / self.sequences.len()
    }

    /// Of all tokens, where the sequences have so many already.
    pub fn positions(self, len: impl Fn(usize) -> usize) -> impl Iterator<Item = usize> {
        let each = self.each();
        self.sequences.iter().flat_map(move |s| len(*s)..len(*s) + each)
    }
}

/// What all layers of one batch share.
pub(crate) struct Step<'a, 'o> {
    pub h: &'a Hparams,
    pub pool: &'a Pool,
    pub rope: &'a RopeTable,
    /// Of each token.
    pub positions: &'a [usize],
    /// Whose tokens these are, as many of each.
    pub sequences: &'a [usize],
    /// None while a model only runs.
    pub observer: Option<&'a Mutex<dyn Observer + 'o>>,
}

impl Step<'_, '_> {
    pub fn n_tokens(&self) -> usize {
        self.positions.len()
    }

    /// Without the first `n` tokens of its only sequence; `rope` keeps their rows.
    pub fn after(&self, n: usize) -> Self {
        debug_assert!(n == 0 || self.sequences.len() == 1);
        Step { positions: &self.positions[n..], ..*self }
    }
}

/// Buffers of one batch. Their sizes are `Scratch::lengths`, which the planner counts too.
pub(crate) struct Scratch {
    pub x: Vec<f32>,
    pub normed: Vec<f32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub attended: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub expert_out: Vec<f32>,
    pub router_scores: Vec<f32>,
    pub quantized: Quantized,
    pub partials: Partials,
}

impl Scratch {
    /// Floats of each buffer, in the order of the fields.
    fn lengths(h: &Hparams, batch: usize) -> [usize; 10] {
        let moe = h.n_experts > 0;
        let ffn = if moe { h.expert_ffn } else { h.ffn };
        let expert = if moe { h.hidden } else { 0 };
        let per_token =
            [h.hidden, h.hidden, h.dim(Dim::Q), h.dim(Dim::K), h.dim(Dim::V), h.dim(Dim::AttnOut), ffn, ffn, expert, h.n_experts];
        per_token.map(|n| n as usize * batch)
    }

    /// Bytes that decoding with batches of `batch` tokens takes beside weights, which ask for `formats`, and KV cache.
    pub fn bytes(h: &Hparams, formats: &[ActivationFormat], batch: usize) -> u64 {
        let floats: usize = Self::lengths(h, batch).iter().sum();
        let widest = h.hidden.max(h.dim(Dim::AttnOut)).max(h.ffn).max(h.expert_ffn) as usize;
        let quantized = Quantized::bytes(formats, batch, widest, if h.n_experts > 0 { h.expert_ffn } else { h.ffn } as usize);
        (floats * 4 + quantized) as u64 + h.vocab * 4
    }

    pub fn new(h: &Hparams, batch: usize) -> Scratch {
        let mut buffers = Self::lengths(h, batch).into_iter().map(|n| vec![0.0f32; n]);
        let mut next = || buffers.next().unwrap_or_default();
        Scratch {
            x: next(),
            normed: next(),
            q: next(),
            k: next(),
            v: next(),
            attended: next(),
            gate: next(),
            up: next(),
            expert_out: next(),
            router_scores: next(),
            quantized: Quantized::new(),
            partials: Partials::default(),
        }
    }
}

pub struct Decoder<'m> {
    model: &'m Model,
    scratch: Scratch,
    /// Tokens that `scratch` holds.
    batch: usize,
    rope: RopeTable,
    frequencies: Vec<f64>,
    magnitude: f32,
    positions: Vec<usize>,
    logits: Vec<f32>,
}

impl<'m> Decoder<'m> {
    pub fn new(model: &'m Model) -> Decoder<'m> {
        let h = model.hparams();
        let (frequencies, magnitude) = rope_frequencies(h, model.rope_factors.as_deref());
        Decoder {
            model,
            scratch: Scratch::new(h, 1),
            batch: 1,
            rope: RopeTable::default(),
            frequencies,
            magnitude,
            positions: Vec::new(),
            logits: Vec::new(),
        }
    }

    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Appends `tokens` to `cache` and returns the wanted logits, rows of `vocab`.
    pub fn forward(&mut self, pool: &Pool, cache: &mut KvCache, tokens: &[u32], want: Want) -> Result<&[f32]> {
        let first_wanted = first_wanted(self.model, cache.len(), cache.capacity(), tokens, want)?;
        self.logits.clear();
        for (i, tokens) in tokens.chunks(BATCH).enumerate() {
            let from = first_wanted.saturating_sub(i * BATCH);
            self.run_batch(pool, std::slice::from_mut(cache), Batch { sequences: &[0], tokens }, from)?;
        }
        Ok(&self.logits)
    }

    /// Appends token i to the cache of index `sequences[i]`, no cache twice, and returns the logits after each.
    pub fn step(&mut self, pool: &Pool, caches: &mut [KvCache], sequences: &[usize], tokens: &[u32]) -> Result<&[f32]> {
        check_step(self.model, sequences, tokens, |s| (caches[s].len(), caches[s].capacity()))?;
        self.logits.clear();
        for (sequences, tokens) in sequences.chunks(BATCH).zip(tokens.chunks(BATCH)) {
            self.run_batch(pool, caches, Batch { sequences, tokens }, 0)?;
        }
        Ok(&self.logits)
    }

    /// One batch; logits of its tokens from `from` on are appended.
    fn run_batch(&mut self, pool: &Pool, caches: &mut [KvCache], batch: Batch<'_>, from: usize) -> Result<()> {
        let h = self.model.hparams();
        let (n, hidden) = (batch.tokens.len(), h.hidden as usize);
        if n > self.batch {
            self.scratch = Scratch::new(h, n);
            self.batch = n;
        }
        for (t, row) in batch.tokens.iter().zip(self.scratch.x.chunks_exact_mut(hidden)) {
            self.model.embed(*t, row)?;
        }
        self.positions.clear();
        self.positions.extend(batch.positions(|s| caches[s].len()));
        self.rope.fill(self.positions.iter().copied(), &self.frequencies, self.magnitude);
        let step = Step { h, pool, rope: &self.rope, positions: &self.positions, sequences: batch.sequences, observer: None };
        // Of tokens whose logits nobody wants, the last layer owes later ones its K and V alone.
        let skipped = if from < n { from.min(n.saturating_sub(LEAST_KEPT)) } else { n };
        let kept = step.after(skipped);
        for (i, layer) in self.model.layers.iter().enumerate() {
            let is_last = i + 1 == self.model.layers.len();
            let (skipped, after) = if is_last { (skipped, &kept) } else { (0, &step) };
            attention::run(&step, i, &layer.attention, caches, &mut self.scratch, skipped);
            feed_forward::run(after, layer, &mut self.scratch);
        }
        batch.sequences.iter().for_each(|s| caches[*s].advance(batch.each()));
        if from < n {
            let before = self.logits.len();
            head(&kept, &self.model.output_norm, &self.model.output, &mut self.scratch, from - skipped, &mut self.logits);
            check_finite(&self.logits[before..], self.model.vocab(), batch.sequences.len(), &self.positions[from..])?;
        }
        Ok(())
    }
}

/// NaN spreads, so each sequence's last row tells whether anything went wrong on the way; `positions` are the rows'.
pub(crate) fn check_finite(logits: &[f32], vocab: usize, n_sequences: usize, positions: &[usize]) -> Result<()> {
    let each = positions.len() / n_sequences;
    let rows = logits.chunks_exact(each * vocab).zip(positions.chunks_exact(each));
    for (rows, positions) in rows {
        if !rows[(each - 1) * vocab..].iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { position: positions[each - 1] });
        }
    }
    Ok(())
}

/// Whether a token may be appended to each of some sequences, of which `room` says how many tokens they have, and can have.
pub(crate) fn check_step(model: &Model, sequences: &[usize], tokens: &[u32], room: impl Fn(usize) -> (usize, usize)) -> Result<()> {
    assert!(sequences.len() == tokens.len(), "{} tokens of {} sequences", tokens.len(), sequences.len());
    let mut sorted = sequences.to_vec();
    sorted.sort_unstable();
    assert!(sorted.windows(2).all(|w| w[0] != w[1]), "a sequence twice");
    if tokens.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    for (s, t) in sequences.iter().zip(tokens) {
        let (len, capacity) = room(*s);
        first_wanted(model, len, capacity, &[*t], Want::Last)?;
    }
    Ok(())
}

/// The first of `tokens` whose logits are wanted, if they may follow `len` others where `capacity` fit.
pub(crate) fn first_wanted(model: &Model, len: usize, capacity: usize, tokens: &[u32], want: Want) -> Result<usize> {
    if tokens.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let needed = len + tokens.len();
    if needed > capacity {
        let hint = format!("raise --ctx (the model was trained for {})", model.hparams().context_length);
        return Err(Error::ContextTooSmall { needed, available: capacity, hint });
    }
    let vocab = model.vocab();
    if let Some(&id) = tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(Error::BadToken { id, vocab });
    }
    Ok(match want {
        Want::Last => tokens.len() - 1,
        Want::From(i) => i.min(tokens.len() - 1),
    })
}

/// Appends the logits of the batch's tokens from `from` on.
pub(crate) fn head(step: &Step, norm: &[f32], output: &Weight, s: &mut Scratch, from: usize, logits: &mut Vec<f32>) {
    let (n, hidden) = (step.n_tokens() - from, step.h.hidden as usize);
    let old = logits.len();
    logits.resize(old + n * step.h.vocab as usize, 0.0);
    let x = &s.x[from * hidden..];
    let normed = |t: usize, out: &mut [f32]| vecmath::rms_norm_row(&x[t * hidden..(t + 1) * hidden], norm, step.h.rms_eps, out);
    s.quantized.matmul(step, n, hidden, &normed, &mut [(output, &mut logits[old..])]);
}

/// Angle per position of each rotated pair, and what cos and sin are multiplied with.
///
/// Plain: θ^(−2j/d). Linear: divided by the factor. YaRN (Peng et al. 2023):
/// c(β) = d·ln(original/(2πβ)) / (2·ln θ); between ⌊c(fast)⌋ and ⌈c(slow)⌉ the
/// frequency blends from unscaled to divided by the factor.
pub(crate) fn rope_frequencies(h: &Hparams, factors: Option<&[f32]>) -> (Vec<f64>, f32) {
    let d = h.rope_dim as f64;
    let theta = f64::from(h.rope_base);
    let plain = (0..h.rope_dim / 2).map(|j| {
        let f = theta.powf(-2.0 * j as f64 / d);
        match factors {
            Some(divide) => f / f64::from(divide[j as usize]),
            None => f,
        }
    });
    match h.rope_scaling {
        RopeScaling::None => (plain.collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|f| f / f64::from(factor)).collect(), 1.0),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, magnitude } => {
            let correction =
                |beta: f32| d * (original_context as f64 / (f64::from(beta) * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
            let low = correction(beta_fast).floor().max(0.0);
            let high = correction(beta_slow).ceil().min(d - 1.0);
            let blended = plain.enumerate().map(|(j, f)| {
                let ramp = 1.0 - ((j as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                (1.0 - ramp) * f / f64::from(factor) + ramp * f
            });
            (blended.collect(), magnitude)
        }
    }
}

//! What each tensor's stand-in (its quantized form, say) costs by itself: the
//! KL divergence of the model with that one tensor replaced from the model as
//! it is. Divergences of small independent errors add up, so these are the
//! shares of a quantized file's divergence.
//!
//! ```text
//! states before layer l ─┬─ layer l ─────────────────────────▶ states before layer l + 1
//!                        └─ layer l, one tensor replaced ─ layers l + 1 … ─ head ─▶ divergence
//! ```

use crate::error::{Error, Result};
use crate::layers::per_token;
use crate::layerwise::Runner;
use crate::model::{Layer, Model, Weight};
use crate::perplexity::{kl_divergence, log_softmax};
use kernels::Pool;

#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    pub tensor: String,
    /// Mean over the tokens, in nats.
    pub divergence: f64,
}

pub struct Blame<'m> {
    model: &'m Model,
    tokens: Vec<u32>,
    context: usize,
    runner: Runner<'m>,
    /// Log-probabilities of the model as it is, a window's after another's.
    reference: Vec<f32>,
    logits: Vec<f32>,
}

impl<'m> Blame<'m> {
    /// Windows of `context` tokens; what is left over is not used.
    pub fn new(pool: &Pool, model: &'m Model, tokens: &[u32], context: usize) -> Result<Self> {
        let n_windows = tokens.len().checked_div(context).unwrap_or(0);
        if n_windows == 0 {
            return Err(Error::TextTooShort { tokens: tokens.len(), needed: context.max(1) });
        }
        let tokens = tokens[..n_windows * context].to_vec();
        if let Some(&id) = tokens.iter().find(|&&t| t as usize >= model.vocab()) {
            return Err(Error::BadToken { id, vocab: model.vocab() });
        }
        let runner = Runner::new(model, context)?;
        let mut b = Blame { model, tokens, context, runner, reference: Vec::new(), logits: Vec::new() };
        for mut window in b.embedded(&model.embedding) {
            b.logits.clear();
            b.finish_window(pool, 0, &mut window, &model.output);
            per_token(pool, &mut b.logits, model.vocab(), |_, row| log_softmax(row));
            b.reference.extend_from_slice(&b.logits);
        }
        match b.reference.iter().all(|v| v.is_finite()) {
            true => Ok(b),
            false => Err(Error::NotFinite { position: context - 1 }),
        }
    }

    /// Bytes of memory beside the weights.
    pub fn memory_bytes(h: &gguf::Hparams, tokens: usize, context: usize) -> u64 {
        let windows = tokens as u64 * (h.hidden + h.vocab) * 4;
        windows + crate::layerwise::Layerwise::memory_bytes(h, context) + context as u64 * h.vocab * 4
    }

    /// Passes of a layer that `run` takes, for a progress bar.
    pub fn n_passes(&self) -> u64 {
        let n = self.model.layers.len();
        // The embedding alone and the model as it is pass all layers; a tensor its own and those above.
        let of_tensors: usize = (0..n).map(|l| self.tensors_of(l).len() * (n - l)).sum();
        (self.tokens.len() / self.context * (of_tensors + 2 * n)) as u64
    }

    /// Names of a layer's matrices, experts as one.
    fn tensors_of(&self, layer: usize) -> Vec<String> {
        let mut names: Vec<String> = self.model.layers[layer].matrices().iter().map(|w| w.tensor().0.to_owned()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Measures every matrix that `stand_in` gives another for, all experts of
    /// a stack at once; `progress` is told of layers passed.
    pub fn run<E: From<Error>>(
        &mut self,
        pool: &Pool,
        mut stand_in: impl FnMut(&Weight) -> std::result::Result<Option<Weight>, E>,
        mut progress: impl FnMut(u64),
    ) -> std::result::Result<Vec<Cost>, E> {
        let model = self.model;
        let n_layers = model.layers.len();
        let mut states = self.embedded(&model.embedding);
        let mut costs = Vec::new();
        let tied = model.embedding.tensor() == model.output.tensor();
        let (embedding, output) = (stand_in(&model.embedding)?, if tied { None } else { stand_in(&model.output)? });
        if let Some(embedding) = embedding {
            let head = if tied { embedding.clone() } else { model.output.clone() };
            let windows = self.embedded(&embedding);
            costs.push(self.cost(pool, embedding.tensor().0, windows, 0, &head)?);
            progress((n_layers * states.len()) as u64);
        }
        for l in 0..n_layers {
            for name in self.tensors_of(l) {
                let mut layer = model.layers[l].clone();
                let mut replaced = false;
                for w in layer.matrices_mut().into_iter().filter(|w| w.tensor().0 == name) {
                    if let Some(other) = stand_in(w)? {
                        *w = other;
                        replaced = true;
                    }
                }
                if replaced {
                    let windows = states.iter().map(|s| self.through(pool, &layer, s)).collect();
                    costs.push(self.cost(pool, &name, windows, l + 1, &model.output)?);
                }
                progress(((n_layers - l) * states.len()) as u64);
            }
            states = states.iter().map(|s| self.through(pool, &model.layers[l], s)).collect();
            progress(states.len() as u64);
        }
        if let Some(output) = output {
            costs.push(self.cost(pool, output.tensor().0, states, n_layers, &output)?);
        }
        Ok(costs)
    }

    fn embedded(&self, embedding: &Weight) -> Vec<Vec<f32>> {
        let hidden = self.model.hparams().hidden as usize;
        let window = |tokens: &[u32]| {
            let mut x = vec![0.0; tokens.len() * hidden];
            for (t, row) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
                embedding.read_rows(*t as usize, row);
            }
            x
        };
        self.tokens.chunks_exact(self.context).map(window).collect()
    }

    fn through(&mut self, pool: &Pool, layer: &Layer, window: &[f32]) -> Vec<f32> {
        let mut window = window.to_vec();
        self.runner.layer(pool, layer, &mut window, None, |_, _| ());
        window
    }

    /// A window from before layer `first` on into `logits`.
    fn finish_window(&mut self, pool: &Pool, first: usize, window: &mut [f32], output: &Weight) {
        for layer in &self.model.layers[first..] {
            self.runner.layer(pool, layer, window, None, |_, _| ());
        }
        self.runner.head(pool, output, window, &mut self.logits);
    }

    /// Mean divergence of all windows, which stand before layer `first`.
    fn cost(&mut self, pool: &Pool, tensor: &str, windows: Vec<Vec<f32>>, first: usize, output: &Weight) -> Result<Cost> {
        let vocab = self.model.vocab();
        let mut total = 0.0;
        for (w, mut window) in windows.into_iter().enumerate() {
            self.logits.clear();
            self.finish_window(pool, first, &mut window, output);
            let reference = &self.reference[w * self.logits.len()..];
            // A row's divergence then takes the place of its first logit.
            per_token(pool, &mut self.logits, vocab, |t, row| {
                log_softmax(row);
                row[0] = kl_divergence(&reference[t * vocab..(t + 1) * vocab], row) as f32;
            });
            total += self.logits.chunks_exact(vocab).map(|row| f64::from(row[0])).sum::<f64>();
        }
        match total.is_finite() {
            true => Ok(Cost { tensor: tensor.to_owned(), divergence: total / self.tokens.len() as f64 }),
            false => Err(Error::NotFinite { position: self.context - 1 }),
        }
    }
}

//! A conversation with a model: context, prefill, token by token, timings.

use crate::decoder::Want;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gpu::Target;
use crate::kv_cache::{CacheShape, KvType};
use crate::model::Model;
use crate::prefetch::Prefetch;
use crate::sampler::Sampler;
use crate::tokenizer::Tokenizer;
use kernels::Pool;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text.
    Stop,
    /// The asked number of tokens was reached.
    Length,
    /// The caller stopped it.
    Cancelled,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Generation {
    pub prompt_tokens: usize,
    pub ids: Vec<u32>,
    pub finish: FinishReason,
    pub prefill: Duration,
    pub decode: Duration,
}

impl Generation {
    pub fn prefill_tok_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Of the tokens after the first, which prefill produced.
    pub fn decode_tok_s(&self) -> f64 {
        self.ids.len().saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

pub struct Session<'m> {
    engine: Engine<'m>,
    history: Vec<u32>,
    /// None: what the CPU runs of the model is not read ahead.
    prefetch: Option<Prefetch>,
}

impl<'m> Session<'m> {
    /// On the CPU, or with as many layers as have room on `gpu`. `context` of 0 takes the model's own length, at
    /// most 4096 unless asked for more; `kv` is how the cache is stored.
    pub fn new(model: &'m Model, gpu: Option<Target>, context: usize, kv: KvType) -> Result<Session<'m>> {
        let own = model.hparams().context_length as usize;
        let context = if context == 0 { own.min(4096) } else { context };
        if context > own && model.hparams().rope_scaling == gguf::RopeScaling::None && context > 4 * own {
            let hint = "the model was not trained for so long a context".to_owned();
            return Err(Error::ContextTooSmall { needed: context, available: 4 * own, hint });
        }
        let engine = Engine::new(model, gpu, CacheShape::one(context, kv))?;
        Ok(Session { engine, history: Vec::new(), prefetch: gpu.is_none().then(|| Prefetch::start(model)) })
    }

    pub fn engine(&self) -> &Engine<'m> {
        &self.engine
    }

    pub fn context(&self) -> usize {
        self.engine.capacity()
    }

    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// Appends tokens and returns the last one's logits.
    pub fn feed(&mut self, pool: &Pool, tokens: &[u32]) -> Result<&[f32]> {
        self.remember(tokens)?;
        self.engine.forward(pool, 0, tokens, Want::Last)
    }

    /// Appends tokens and draws the next one.
    fn next(&mut self, pool: &Pool, tokens: &[u32], sampler: &mut Sampler) -> Result<u32> {
        self.remember(tokens)?;
        self.engine.sample(pool, 0, tokens, sampler, &self.history)
    }

    /// Before `tokens` are run.
    fn remember(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(reason) = self.prefetch.as_ref().and_then(Prefetch::error) {
            return Err(Error::Prefetch { reason });
        }
        self.engine.model().file().check_length()?;
        self.history.extend_from_slice(tokens);
        Ok(())
    }

    /// Keeps what a new prompt shares with the past, so that only the rest is computed; returns the rest.
    pub fn rewind_to_common<'t>(&mut self, prompt: &'t [u32]) -> &'t [u32] {
        let common = self.history.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // At least one token must run to give logits.
        let common = common.min(prompt.len().saturating_sub(1)).min(self.engine.len(0));
        self.history.truncate(common);
        self.engine.truncate(0, common);
        &prompt[common..]
    }

    /// Completes `prompt`. `emit` gets each id as it comes; false stops.
    pub fn generate(
        &mut self,
        pool: &Pool,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        n: usize,
        sampler: &mut Sampler,
        mut emit: impl FnMut(u32) -> bool,
    ) -> Result<Generation> {
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let rest = self.rewind_to_common(prompt).to_vec();
        let (needed, available) = (prompt.len() + n, self.context());
        if needed > available {
            let hint = format!("raise --ctx or lower -n (the model was trained for {})", self.engine.model().hparams().context_length);
            return Err(Error::ContextTooSmall { needed, available, hint });
        }
        let mut out = Generation {
            prompt_tokens: rest.len(),
            ids: Vec::new(),
            finish: FinishReason::Length,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        };
        let start = Instant::now();
        let mut id = self.next(pool, &rest, sampler)?;
        out.prefill = start.elapsed();
        let start = Instant::now();
        while out.ids.len() < n {
            if tokenizer.ends.contains(&id) {
                out.finish = FinishReason::Stop;
                break;
            }
            out.ids.push(id);
            if !emit(id) {
                out.finish = FinishReason::Cancelled;
                break;
            }
            if out.ids.len() < n {
                id = self.next(pool, &[id], sampler)?;
            }
        }
        out.decode = start.elapsed();
        Ok(out)
    }
}

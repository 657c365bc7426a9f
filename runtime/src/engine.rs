//! A model with its context, on the CPU or on a GPU: what sessions and measurements run.

use crate::decoder::{Decoder, Want};
use crate::error::Result;
use crate::gpu::{self, GpuDecoder, Split, Target};
use crate::kv_cache::{KvCache, KvType};
use crate::model::Model;
use crate::sampler::Sampler;
use kernels::Pool;

enum Place<'m> {
    Cpu(Box<Decoder<'m>>, KvCache),
    Gpu(Box<GpuDecoder<'m>>),
}

pub struct Engine<'m> {
    model: &'m Model,
    place: Place<'m>,
}

impl<'m> Engine<'m> {
    /// On the CPU, or with as many layers as have room on `gpu`, for `context` tokens kept as `kv`.
    pub fn new(model: &'m Model, gpu: Option<Target>, context: usize, kv: KvType) -> Result<Engine<'m>> {
        let place = match gpu {
            Some(target) => Place::Gpu(Box::new(gpu::place(model, target, context, kv)?)),
            None => Place::Cpu(Box::new(Decoder::new(model)), KvCache::new(model.hparams(), context, kv)?),
        };
        Ok(Engine { model, place })
    }

    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Which layers are on the GPU; None: there is none.
    pub fn split(&self) -> Option<Split> {
        match &self.place {
            Place::Cpu(..) => None,
            Place::Gpu(decoder) => Some(decoder.split()),
        }
    }

    /// Appends `tokens` and returns the wanted logits, rows of `vocab`.
    pub fn forward(&mut self, pool: &Pool, tokens: &[u32], want: Want) -> Result<&[f32]> {
        match &mut self.place {
            Place::Cpu(decoder, cache) => decoder.forward(pool, cache, tokens, want),
            Place::Gpu(decoder) => decoder.forward(pool, tokens, want),
        }
    }

    /// Appends `tokens` and draws the one after them; `history` is all that came before it.
    pub fn sample(&mut self, pool: &Pool, tokens: &[u32], sampler: &mut Sampler, history: &[u32]) -> Result<u32> {
        if let (Place::Gpu(decoder), Some(k)) = (&mut self.place, sampler.needs_top())
            && let Some(top) = decoder.forward_top(pool, tokens, k)?
        {
            return Ok(sampler.sample_top(top));
        }
        let logits = self.forward(pool, tokens, Want::Last)?;
        Ok(sampler.sample(logits, history))
    }

    /// Tokens that can be stored.
    pub fn capacity(&self) -> usize {
        match &self.place {
            Place::Cpu(_, cache) => cache.capacity(),
            Place::Gpu(decoder) => decoder.capacity(),
        }
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        match &self.place {
            Place::Cpu(_, cache) => cache.len(),
            Place::Gpu(decoder) => decoder.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens from position `n` on.
    pub fn truncate(&mut self, n: usize) {
        match &mut self.place {
            Place::Cpu(_, cache) => cache.truncate(n),
            Place::Gpu(decoder) => decoder.truncate(n),
        }
    }
}

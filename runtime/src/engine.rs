//! A model with what it remembers, of one text or of several side by side, on the CPU or on a GPU: what sessions and
//! measurements run.

use crate::decoder::{Decoder, Want};
use crate::error::Result;
use crate::gpu::{self, GpuDecoder, Split, Target};
use crate::kv_cache::{CacheShape, KvCache};
use crate::model::Model;
use crate::sampler::Sampler;
use kernels::Pool;

enum Place<'m> {
    /// A cache a sequence.
    Cpu(Box<Decoder<'m>>, Vec<KvCache>),
    Gpu(Box<GpuDecoder<'m>>),
}

pub struct Engine<'m> {
    model: &'m Model,
    place: Place<'m>,
}

impl<'m> Engine<'m> {
    /// On the CPU, or with as many layers as have room on `gpu`.
    pub fn new(model: &'m Model, gpu: Option<Target>, shape: CacheShape) -> Result<Engine<'m>> {
        let place = match gpu {
            Some(target) => Place::Gpu(Box::new(gpu::place(model, target, shape)?)),
            None => {
                let cache = |_| KvCache::new(model.hparams(), shape.context, shape.kv);
                Place::Cpu(Box::new(Decoder::new(model)), (0..shape.sequences).map(cache).collect::<Result<_>>()?)
            }
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

    /// Appends `tokens` to a sequence and returns the wanted logits, rows of `vocab`.
    pub fn forward(&mut self, pool: &Pool, sequence: usize, tokens: &[u32], want: Want) -> Result<&[f32]> {
        match &mut self.place {
            Place::Cpu(decoder, caches) => decoder.forward(pool, &mut caches[sequence], tokens, want),
            Place::Gpu(decoder) => decoder.forward(pool, sequence, tokens, want),
        }
    }

    /// Appends token i to sequence `sequences[i]`, none twice, and returns the logits after each.
    pub fn step(&mut self, pool: &Pool, sequences: &[usize], tokens: &[u32]) -> Result<&[f32]> {
        match &mut self.place {
            Place::Cpu(decoder, caches) => decoder.step(pool, caches, sequences, tokens),
            Place::Gpu(decoder) => decoder.step(pool, sequences, tokens),
        }
    }

    /// Appends `tokens` to a sequence and draws the one after them; `history` is all that came before it.
    pub fn sample(&mut self, pool: &Pool, sequence: usize, tokens: &[u32], sampler: &mut Sampler, history: &[u32]) -> Result<u32> {
        if let (Place::Gpu(decoder), Some(k)) = (&mut self.place, sampler.needs_top())
            && let Some(top) = decoder.forward_top(pool, sequence, tokens, k)?
        {
            return Ok(sampler.sample_top(top));
        }
        let logits = self.forward(pool, sequence, tokens, Want::Last)?;
        Ok(sampler.sample(logits, history))
    }

    /// Tokens that a sequence can have.
    pub fn capacity(&self) -> usize {
        match &self.place {
            Place::Cpu(_, caches) => caches.first().map_or(0, KvCache::capacity),
            Place::Gpu(decoder) => decoder.capacity(),
        }
    }

    /// Tokens that a sequence has.
    pub fn len(&self, sequence: usize) -> usize {
        match &self.place {
            Place::Cpu(_, caches) => caches[sequence].len(),
            Place::Gpu(decoder) => decoder.len(sequence),
        }
    }

    /// Forgets all tokens of a sequence from position `n` on.
    pub fn truncate(&mut self, sequence: usize, n: usize) {
        match &mut self.place {
            Place::Cpu(_, caches) => caches[sequence].truncate(n),
            Place::Gpu(decoder) => decoder.truncate(sequence, n),
        }
    }
}

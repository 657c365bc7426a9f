//! A step of a few tokens: five launches a layer, each quantizing what the
//! next one takes. Steps are captured once and then replayed.

use super::memory::Split;
use super::{FeedForward, Layer, Scratch, forms};
use crate::error::Result;
use cuda::{
    Buffer, Choice, Device, ExpertJob, FEW, Form, Graph, Heads, Holds, Job, LayerCache, Onward, Product, StepPart, StepState, TakenExperts,
    Then, Top, WeightMatrix, attention_step, decode_begin, decode_experts, decode_experts_gated, decode_matmul,
};
use gguf::Hparams;
use std::collections::HashMap;

/// What a captured step depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub n_sequences: usize,
    /// Of all of them together.
    pub n_tokens: usize,
    pub n_splits: usize,
    pub head: Head,
}

/// What is made of the last layer's output.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Head {
    Nothing,
    Logits,
    /// Logits, and the likeliest tokens after the last one.
    Top,
}

pub(super) struct Few {
    /// Inputs from the residual stream, normed.
    stream: Onward,
    /// Inputs from within a layer: what attention found, the gated product.
    inner: Onward,
    /// Of the layer at hand, if the model has experts.
    taken: Option<TakenExperts>,
}

/// Steps that came before. None: once, so that all kernels are loaded; captured the second time.
#[derive(Default)]
pub(super) struct Graphs(HashMap<Kind, Option<Graph>>);

impl Graphs {
    /// Does what `launch` asks for, which nothing but memory and the kind of step decides.
    pub fn run(&mut self, device: &Device, kind: Kind, mut launch: impl FnMut() -> Result<()>) -> Result<()> {
        debug_assert!(kind.n_tokens <= FEW);
        match self.0.get(&kind) {
            None => {
                self.0.insert(kind, None);
                return launch();
            }
            Some(Some(graph)) if device.replay(graph)? => return Ok(()),
            // Not captured yet, or something was freed since.
            Some(_) => {}
        }
        let graph = device.capture(launch)?;
        device.replay(&graph)?;
        self.0.insert(kind, Some(graph));
        Ok(())
    }
}

/// What one step's launches have in common.
pub(super) struct Parts<'a> {
    pub h: &'a Hparams,
    pub device: &'a Device,
    pub layers: &'a [Layer],
    pub cache: &'a mut [LayerCache],
    pub output_norm: &'a Buffer,
    pub output: &'a WeightMatrix,
    pub scratch: &'a Scratch,
    pub state: &'a StepState,
    pub top: &'a Top,
    /// Rotated pairs of a head.
    pub pairs: usize,
    pub window: usize,
}

impl Few {
    /// None: not of a model with so many experts, or with some on the host.
    pub fn new(device: &Device, h: &Hparams, forms: &[Form], split: Split) -> Result<Option<Few>> {
        let Some([stream, inner]) = Few::inputs(h, split) else { return Ok(None) };
        let onward = |(columns, holds)| Onward::new(device, forms, columns, holds);
        let taken = (h.n_experts > 0).then(|| TakenExperts::new(device)).transpose()?;
        Ok(Some(Few { stream: onward(stream)?, inner: onward(inner)?, taken }))
    }

    /// Columns of the two inputs, and what they hold.
    fn inputs(h: &Hparams, split: Split) -> Option<[(usize, Holds); 2]> {
        let (stream, inner) = (h.hidden as usize, h.dim(gguf::arch::Dim::AttnOut).max(h.ffn) as usize);
        if h.n_experts == 0 {
            return Some([(stream, Holds::Rows), (inner, Holds::Rows)]);
        }
        let choice = Choice { n_experts: h.n_experts as usize, n_used: h.n_experts_used as usize };
        let whole = choice.is_few() && !split.parts_layers(h);
        whole.then_some([(stream, Holds::Scored(choice)), (inner, Holds::OfExperts(choice))])
    }

    /// Bytes of each buffer that `new`, a `StepState` for so many sequences and a `Top` allocate.
    pub fn bytes_for(h: &Hparams, heads: Heads, forms: &[Form], sequences: usize, split: Split) -> Vec<u64> {
        let inputs = Few::inputs(h, split);
        let taken = (inputs.is_some() && h.n_experts > 0).then_some(TakenExperts::BYTES);
        let inputs = inputs.into_iter().flatten().flat_map(|(columns, holds)| Onward::bytes_for(forms, columns, holds));
        inputs.chain(taken).chain(StepState::bytes_for(heads, sequences)).chain(Top::bytes_for(h.vocab as usize)).collect()
    }

    /// Launches what runs the tokens whose hidden states are in `scratch.x`, from where `state` says.
    pub fn launch(&mut self, kind: Kind, p: &mut Parts<'_>) -> Result<()> {
        let (d, s, n, eps) = (p.device, p.scratch, kind.n_tokens, p.h.rms_eps);
        let Few { stream, inner, taken } = self;
        // What reads the residual stream at layer i: its norm, and the forms that are wanted.
        let layers = p.layers;
        let reader = |i: usize| match layers.get(i) {
            Some(l) => (&l.norm, forms(d, &l.qkv.each_ref(), n)),
            None => (p.output_norm, vec![p.output.form()]),
        };
        let (norm, wanted) = reader(0);
        decode_begin(d, &s.x, n, p.h.hidden as usize, Then::new(stream, Some(norm), &wanted))?;
        for (i, (layer, cache)) in p.layers.iter().zip(p.cache.iter_mut()).enumerate() {
            let job = |weights, out| Job { weights, out, add: false };
            let [q, k, v] = &s.qkv;
            decode_matmul(d, &[job(&layer.qkv[0], q), job(&layer.qkv[1], k), job(&layer.qkv[2], v)], Product::Each, stream, eps, None)?;
            let wanted = [layer.output.form()];
            let then = Then::new(inner, None, &wanted);
            let part = StepPart { sequences: 0..kind.n_sequences, each: n / kind.n_sequences, window: p.window, n_splits: kind.n_splits };
            attention_step(d, &layer.rotation(p.h, s, p.pairs), [q, k, v], cache, &s.attended, p.state, &part, Some(then))?;
            let (next_norm, of_next) = reader(i + 1);
            let output = [Job { weights: &layer.output, out: &s.x, add: true }];
            match &layer.feed_forward {
                FeedForward::Experts(e) => {
                    let Some(taken) = taken else { unreachable!("made where experts are") };
                    let (wanted, of_last) = (forms(d, &[e.gate.first(), e.up.first()], n), [e.down.first().form()]);
                    let job = |weights, out| ExpertJob { weights, out };
                    let then = Then { router: Some(&e.router.rows), ..Then::new(stream, Some(&e.router.norm), &wanted) };
                    decode_matmul(d, &output, Product::Each, inner, eps, Some(then))?;
                    let gated = [job(&e.gate, &s.gate), job(&e.up, &s.up)];
                    decode_experts_gated(d, gated, stream, taken, &e.router, Then::new(inner, None, &of_last))?;
                    decode_experts(d, job(&e.down, &s.x), inner, taken, Then::new(stream, Some(next_norm), &of_next))?;
                }
                FeedForward::Dense(mlp) => {
                    let (wanted, of_last) = (forms(d, &[&mlp.gate, &mlp.up], n), [mlp.down.form()]);
                    decode_matmul(d, &output, Product::Each, inner, eps, Some(Then::new(stream, Some(&mlp.norm), &wanted)))?;
                    let gated = [job(&mlp.gate, &s.gate), job(&mlp.up, &s.up)];
                    decode_matmul(d, &gated, Product::Gated, stream, eps, Some(Then::new(inner, None, &of_last)))?;
                    let down = [Job { weights: &mlp.down, out: &s.x, add: true }];
                    decode_matmul(d, &down, Product::Each, inner, eps, Some(Then::new(stream, Some(next_norm), &of_next)))?;
                }
                FeedForward::OnHost => unreachable!("not in a step of a few tokens"),
            }
        }
        if kind.head != Head::Nothing {
            decode_matmul(d, &[Job { weights: p.output, out: &s.logits, add: false }], Product::Each, stream, eps, None)?;
        }
        if kind.head == Head::Top {
            p.top.find(d, &s.logits, n - 1)?;
        }
        Ok(())
    }
}

//! A step of a few tokens: five launches a layer, each quantizing what the
//! next one takes. Steps are captured once and then replayed.

use super::{FeedForward, Layer, Scratch, forms};
use crate::error::Result;
use cuda::{
    Buffer, Device, FEW, Form, Graph, Heads, Job, LayerCache, Onward, Product, StepPart, StepState, Then, Top, WeightMatrix,
    attention_step, decode_begin, decode_matmul,
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
    /// None: weights of these forms are not multiplied so, as halves are not made on the way.
    pub fn new(device: &Device, h: &Hparams, forms: &[Form]) -> Result<Option<Few>> {
        Few::widths(h, forms)
            .map(|[stream, inner]| {
                let (stream, inner) = (Onward::new(device, forms, stream)?, Onward::new(device, forms, inner)?);
                Ok(Few { stream, inner })
            })
            .transpose()
    }

    /// Columns of the two inputs.
    fn widths(h: &Hparams, forms: &[Form]) -> Option<[usize; 2]> {
        let inner = h.dim(gguf::arch::Dim::AttnOut).max(h.ffn);
        (h.n_experts == 0 && forms.iter().all(|f| f.is_quantized())).then_some([h.hidden as usize, inner as usize])
    }

    /// Bytes of each buffer that `new`, a `StepState` for so many sequences and a `Top` allocate.
    pub fn bytes_for(h: &Hparams, heads: Heads, forms: &[Form], sequences: usize) -> Vec<u64> {
        let inputs = Few::widths(h, forms).into_iter().flatten().flat_map(|w| Onward::bytes_for(forms, w));
        inputs.chain(StepState::bytes_for(heads, sequences)).chain(Top::bytes_for(h.vocab as usize)).collect()
    }

    /// Launches what runs the tokens whose hidden states are in `scratch.x`, from where `state` says.
    pub fn launch(&mut self, kind: Kind, p: &mut Parts<'_>) -> Result<()> {
        let (d, s, n, eps) = (p.device, p.scratch, kind.n_tokens, p.h.rms_eps);
        let Few { stream, inner } = self;
        // What reads the residual stream at layer i: its norm, and the forms that are wanted.
        let layers = p.layers;
        let reader = |i: usize| match layers.get(i) {
            Some(l) => (&l.norm, forms(d, &l.qkv.each_ref(), n)),
            None => (p.output_norm, vec![p.output.form()]),
        };
        let (norm, wanted) = reader(0);
        decode_begin(d, &s.x, n, p.h.hidden as usize, Then { onward: stream, norm: Some(norm), forms: &wanted })?;
        for (i, (layer, cache)) in p.layers.iter().zip(p.cache.iter_mut()).enumerate() {
            let FeedForward::Dense(mlp) = &layer.feed_forward else { continue };
            let job = |weights, out| Job { weights, out, add: false };
            let [q, k, v] = &s.qkv;
            decode_matmul(d, &[job(&layer.qkv[0], q), job(&layer.qkv[1], k), job(&layer.qkv[2], v)], Product::Each, stream, eps, None)?;
            let then = Then { onward: &mut *inner, norm: None, forms: &[layer.output.form()] };
            let part = StepPart { sequences: 0..kind.n_sequences, each: n / kind.n_sequences, window: p.window, n_splits: kind.n_splits };
            attention_step(d, &layer.rotation(p.h, s, p.pairs), [q, k, v], cache, &s.attended, p.state, &part, Some(then))?;
            let wanted = forms(d, &[&mlp.gate, &mlp.up], n);
            let then = Then { onward: &mut *stream, norm: Some(&mlp.norm), forms: &wanted };
            decode_matmul(d, &[Job { weights: &layer.output, out: &s.x, add: true }], Product::Each, inner, eps, Some(then))?;
            let then = Then { onward: &mut *inner, norm: None, forms: &[mlp.down.form()] };
            decode_matmul(d, &[job(&mlp.gate, &s.gate), job(&mlp.up, &s.up)], Product::Gated, stream, eps, Some(then))?;
            let (norm, wanted) = reader(i + 1);
            let then = Then { onward: &mut *stream, norm: Some(norm), forms: &wanted };
            decode_matmul(d, &[Job { weights: &mlp.down, out: &s.x, add: true }], Product::Each, inner, eps, Some(then))?;
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

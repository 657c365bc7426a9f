//! A batch through the layers launch by launch: any number of tokens, of experts
//! that each takes, parts of it on the host. What a matmul takes is quantized by a
//! launch of its own; a step of a few tokens has fewer launches (`step.rs`).

use super::step::Parts;
use super::{Experts, FeedForward, Mlp, forms};
use crate::error::Result;
use cuda::{ExpertJob, FEW, Inputs, Job, OnTheWay, Routing, StepPart, attention, attention_step, form_of, matmul, matmul_experts, rotate};
use gguf::arch::Dim;

/// How the tokens attend.
#[derive(Clone, Copy)]
pub(super) enum Attend {
    /// One sequence's, from a position on.
    Run { sequence: usize, position: usize },
    /// `each` of every sequence, from where the step's state says.
    Step { n_sequences: usize, each: usize, n_splits: usize },
}

pub(super) struct Launches<'a> {
    pub parts: Parts<'a>,
    pub inputs: &'a mut Inputs,
    pub routing: Option<&'a mut Routing>,
    pub n_tokens: usize,
    pub attend: Attend,
}

impl Launches<'_> {
    /// Tokens whose hidden states are in `scratch.x`; `on_host` runs the feed-forward network of a layer that the GPU
    /// has without.
    pub fn layers(&mut self, mut on_host: impl FnMut(usize) -> Result<()>) -> Result<()> {
        for (i, layer) in self.parts.layers.iter().enumerate() {
            self.attention(i)?;
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => self.dense(mlp)?,
                FeedForward::Experts(experts) => self.experts(experts)?,
                FeedForward::OnHost => on_host(i)?,
            }
        }
        Ok(())
    }

    /// Of the residual stream and within a feed-forward network, and the norms' epsilon.
    fn widths(&self) -> (usize, usize, f32) {
        let h = self.parts.h;
        (h.hidden as usize, h.ffn as usize, h.rms_eps)
    }

    fn attention(&mut self, i: usize) -> Result<()> {
        let (hidden, _, eps) = self.widths();
        let (p, n) = (&mut self.parts, self.n_tokens);
        let (d, s, layer, cache) = (p.device, p.scratch, &p.layers[i], &mut p.cache[i]);
        let job = |weights, out| Job { weights, out, add: false };
        self.inputs.fill(d, &s.x, 0, n, hidden, OnTheWay::Norm { weight: &layer.norm, eps }, &forms(d, &layer.qkv.each_ref(), n))?;
        let [q, k, v] = &s.qkv;
        matmul(d, &[job(&layer.qkv[0], q), job(&layer.qkv[1], k), job(&layer.qkv[2], v)], self.inputs)?;
        let rotation = layer.rotation(p.h, s, p.pairs);
        match self.attend {
            Attend::Run { sequence, position } => {
                rotate(d, &rotation, [q, k, v], cache, sequence, position, n)?;
                attention(d, cache, sequence, q, &s.attended, position, n, p.window)?;
            }
            Attend::Step { n_sequences, each, n_splits } => {
                for first in (0..n_sequences).step_by(FEW / each) {
                    let part = StepPart { sequences: first..n_sequences.min(first + FEW / each), each, window: p.window, n_splits };
                    attention_step(d, &rotation, [q, k, v], cache, &s.attended, p.state, &part, None)?;
                }
            }
        }
        self.inputs.fill(d, &s.attended, 0, n, p.h.dim(Dim::AttnOut) as usize, OnTheWay::Nothing, &[form_of(d, &layer.output, n)])?;
        Ok(matmul(d, &[Job { weights: &layer.output, out: &s.x, add: true }], self.inputs)?)
    }

    fn dense(&mut self, mlp: &Mlp) -> Result<()> {
        let (d, s, n) = (self.parts.device, self.parts.scratch, self.n_tokens);
        let (hidden, ffn, eps) = self.widths();
        let job = |weights, out| Job { weights, out, add: false };
        let norm = OnTheWay::Norm { weight: &mlp.norm, eps };
        self.inputs.fill(d, &s.x, 0, n, hidden, norm, &forms(d, &[&mlp.gate, &mlp.up], n))?;
        matmul(d, &[job(&mlp.gate, &s.gate), job(&mlp.up, &s.up)], self.inputs)?;
        self.inputs.fill(d, &s.gate, 0, n, ffn, OnTheWay::SwiGlu { up: &s.up }, &[form_of(d, &mlp.down, n)])?;
        Ok(matmul(d, &[Job { weights: &mlp.down, out: &s.x, add: true }], self.inputs)?)
    }

    fn experts(&mut self, e: &Experts) -> Result<()> {
        let (hidden, ffn, eps) = self.widths();
        let (d, s, n, inputs) = (self.parts.device, self.parts.scratch, self.n_tokens, &mut *self.inputs);
        let Some(routing) = self.routing.as_deref_mut() else { unreachable!("made where experts are") };
        let job = |weights, out| ExpertJob { weights, out };
        routing.route(d, &e.router, &s.x, n, hidden)?;
        let norm = OnTheWay::Norm { weight: &e.router.norm, eps };
        let of_gated = [&e.gate, &e.up].map(|m| routing.form_of(m.first()));
        inputs.fill_routed(d, &s.x, routing, hidden, norm, &of_gated)?;
        matmul_experts(d, &[job(&e.gate, &s.gate), job(&e.up, &s.up)], inputs, routing)?;
        inputs.fill_routed(d, &s.gate, routing, ffn, OnTheWay::SwiGlu { up: &s.up }, &[routing.form_of(e.down.first())])?;
        matmul_experts(d, &[job(&e.down, &s.gate)], inputs, routing)?;
        Ok(routing.combine(d, &s.gate, &s.x, hidden)?)
    }
}

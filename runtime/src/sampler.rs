//! From logits to a token: repeat penalty, top-k, top-p, min-p, temperature,
//! in that order (llama.cpp's), then a seeded draw. Temperature 0 is greedy.

use crate::error::{Error, Result};
use kernels::vecmath;

#[derive(Debug, Clone)]
pub struct SamplerOptions {
    pub temperature: f32,
    /// 0: all.
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    /// Divides the logits of recent tokens (multiplies negative ones); 1 is off.
    pub repeat_penalty: f32,
    /// Tokens looked back on by the penalty.
    pub repeat_window: usize,
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.0, repeat_window: 64, seed: 0 }
    }
}

impl SamplerOptions {
    pub fn greedy() -> Self {
        SamplerOptions { temperature: 0.0, ..Self::default() }
    }

    pub fn check(&self) -> Result<()> {
        let bad = |what, value: f32, rule| Err(Error::BadOption { what, value: value.to_string(), rule });
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return bad("--temp", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("--top-p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("--min-p", self.min_p, "0 to 1");
        }
        if !self.repeat_penalty.is_finite() || self.repeat_penalty <= 0.0 {
            return bad("--repeat-penalty", self.repeat_penalty, "above 0");
        }
        Ok(())
    }
}

pub struct Sampler {
    options: SamplerOptions,
    state: u64,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        options.check()?;
        Ok(Sampler { state: options.seed, options, candidates: Vec::new() })
    }

    /// SplitMix64 to a uniform in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The next token, given the logits and the tokens so far.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let o = self.options.clone();
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(i, &l)| (i as u32, l)));
        if o.repeat_penalty != 1.0 {
            let mut recent: Vec<u32> = history[history.len().saturating_sub(o.repeat_window)..].to_vec();
            recent.sort_unstable();
            recent.dedup();
            for id in recent {
                if let Some((_, l)) = self.candidates.get_mut(id as usize) {
                    *l = if *l > 0.0 { *l / o.repeat_penalty } else { *l * o.repeat_penalty };
                }
            }
        }
        // The lower id wins a tie, so that greedy is the same everywhere.
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if o.temperature == 0.0 {
            return self.candidates.iter().min_by(|a, b| by_logit(a, b)).map_or(0, |c| c.0);
        }
        if o.top_k > 0 && o.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(o.top_k - 1, by_logit);
            self.candidates.truncate(o.top_k);
        }
        self.candidates.sort_unstable_by(by_logit);
        self.draw()
    }

    /// How many of the likeliest tokens decide the next one; None: all may.
    pub fn needs_top(&self) -> Option<usize> {
        let o = &self.options;
        match (o.temperature == 0.0, o.top_k) {
            _ if o.repeat_penalty != 1.0 => None,
            (true, _) => Some(1),
            (false, 0) => None,
            (false, k) => Some(k),
        }
    }

    /// As `sample`, of the tokens that `needs_top` asked for, likeliest first.
    pub fn sample_top(&mut self, top: Vec<(u32, f32)>) -> u32 {
        self.candidates = top;
        if self.options.temperature == 0.0 { self.candidates.first().map_or(0, |c| c.0) } else { self.draw() }
    }

    /// From candidates in falling order.
    fn draw(&mut self) -> u32 {
        let o = self.options.clone();
        let mut p: Vec<f32> = self.candidates.iter().map(|c| c.1).collect();
        vecmath::softmax(&mut p);
        let mut cumulative = 0.0;
        let within = p
            .iter()
            .take_while(|&&x| {
                let keep = cumulative < o.top_p;
                cumulative += x;
                keep
            })
            .count()
            .max(1);
        let likely = p.iter().take_while(|&&x| x >= o.min_p * p[0]).count().max(1);
        self.candidates.truncate(within.min(likely));
        let mut p: Vec<f32> = self.candidates.iter().map(|c| c.1 / o.temperature).collect();
        vecmath::softmax(&mut p);
        let mut left = self.uniform();
        for (c, x) in self.candidates.iter().zip(&p) {
            left -= f64::from(*x);
            if left < 0.0 {
                return c.0;
            }
        }
        self.candidates[self.candidates.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals_and_seeds_repeat() {
        let logits = [0.0, 3.0, 3.0, -1.0];
        assert_eq!(Sampler::new(SamplerOptions::greedy()).unwrap().sample(&logits, &[]), 1);
        let draw = |seed| {
            let mut s = Sampler::new(SamplerOptions { seed, temperature: 1.0, ..Default::default() }).unwrap();
            (0..50).map(|_| s.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn limits_exclude_the_unlikely() {
        let logits = [5.0, 4.0, 1.0, 0.0];
        let all = |o: SamplerOptions| {
            let mut s = Sampler::new(SamplerOptions { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..o }).unwrap();
            (0..2000).map(|_| s.sample(&logits, &[])).max().unwrap()
        };
        assert_eq!(all(SamplerOptions::default()), 3);
        let mut k = Sampler::new(SamplerOptions { temperature: 2.0, top_k: 2, top_p: 1.0, min_p: 0.0, ..Default::default() }).unwrap();
        assert!((0..2000).all(|_| k.sample(&logits, &[]) < 2));
        let mut p = Sampler::new(SamplerOptions { temperature: 2.0, top_k: 0, top_p: 0.5, min_p: 0.0, ..Default::default() }).unwrap();
        assert!((0..2000).all(|_| p.sample(&logits, &[]) == 0));
        let mut m = Sampler::new(SamplerOptions { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.3, ..Default::default() }).unwrap();
        assert!((0..2000).all(|_| m.sample(&logits, &[]) < 2));
    }
}

//! TABLE of mixes: which type each tensor gets under a name such as Q4_K_M.
//!
//! The choices equal llama-quantize's, so that files have the same sizes and
//! can be compared; each row is the default type and a rule for the tensors
//! that deserve more. Whoever adds a mix adds a row.

use crate::error::{Error, Result};
use gguf::blocks::{self, *};
use gguf::{BlockType, Hparams};

/// What a tensor is, as far as mixes care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    TokenEmbd,
    Output,
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    FfnDown,
    Other,
}

/// What a rule may look at.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    pub kind: Kind,
    pub layer: u64,
    pub n_layers: u64,
    /// Query heads a key/value head.
    pub gqa: u64,
    pub n_experts: u64,
    pub has_importance: bool,
}

impl Context {
    /// The layers that deserve more bits: the first and last eighth, and every third between.
    fn more(&self) -> bool {
        let (i, n) = (self.layer, self.n_layers);
        i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
    }

    fn in_first(&self, parts: u64) -> bool {
        self.layer < self.n_layers / parts
    }

    fn eight_experts(&self) -> bool {
        self.n_experts == 8
    }
}

/// None: the mix's default.
type Rule = fn(&Context) -> Option<&'static BlockType>;

pub struct Mix {
    pub name: &'static str,
    /// `general.file_type`.
    pub file_type: u32,
    pub default: &'static BlockType,
    rule: Rule,
    /// With eight experts, attn_output gets Q5_K.
    experts_lift_output: bool,
}

const fn mix(name: &'static str, file_type: u32, default: &'static BlockType, rule: Rule) -> Mix {
    Mix { name, file_type, default, rule, experts_lift_output: false }
}

const fn lifting(m: Mix) -> Mix {
    Mix { experts_lift_output: true, ..m }
}

fn plain(_: &Context) -> Option<&'static BlockType> {
    None
}

pub static TABLE: &[Mix] = &[
    mix("F32", 0, &F32, plain),
    mix("F16", 1, &F16, plain),
    mix("BF16", 32, &BF16, plain),
    mix("Q8_0", 7, &Q8_0, plain),
    mix("Q4_0", 2, &Q4_0, |c| (c.kind == Kind::FfnDown && c.has_importance && c.in_first(8)).then_some(&Q4_1)),
    mix("Q4_1", 3, &Q4_1, plain),
    mix("Q5_0", 8, &Q5_0, |c| (c.kind == Kind::FfnDown && c.has_importance && c.in_first(8)).then_some(&Q5_1)),
    mix("Q5_1", 9, &Q5_1, plain),
    lifting(mix("Q2_K", 10, &Q2_K, |c| match c.kind {
        Kind::AttnV => Some(if c.gqa >= 4 { &Q4_K } else { &Q3_K }),
        Kind::FfnDown | Kind::AttnOutput => Some(&Q3_K),
        _ => None,
    })),
    lifting(mix("Q3_K_S", 11, &Q3_K, plain)),
    lifting(mix("Q3_K_M", 12, &Q3_K, |c| match c.kind {
        Kind::AttnV => Some(if c.layer < 2 { &Q5_K } else { &Q4_K }),
        Kind::FfnDown => Some(if c.in_first(16) { &Q5_K } else { &Q4_K }),
        Kind::AttnOutput => Some(&Q4_K),
        _ => None,
    })),
    mix("Q3_K_L", 13, &Q3_K, |c| match c.kind {
        Kind::AttnV | Kind::FfnDown => Some(&Q5_K),
        Kind::AttnOutput if !c.eight_experts() => Some(&Q5_K),
        _ => None,
    }),
    lifting(mix("Q4_K_S", 14, &Q4_K, |c| match c.kind {
        Kind::AttnV => (c.layer < 4).then_some(&Q5_K),
        Kind::FfnDown => c.in_first(8).then_some(&Q5_K),
        _ => None,
    })),
    lifting(mix("Q4_K_M", 15, &Q4_K, |c| (matches!(c.kind, Kind::AttnV | Kind::FfnDown) && c.more()).then_some(&Q6_K))),
    mix("Q5_K_S", 16, &Q5_K, plain),
    mix("Q5_K_M", 17, &Q5_K, |c| (matches!(c.kind, Kind::AttnV | Kind::FfnDown) && c.more()).then_some(&Q6_K)),
    mix("Q6_K", 18, &Q6_K, plain),
    lifting(mix("IQ4_NL", 25, &IQ4_NL, iq4)),
    lifting(mix("IQ4_XS", 30, &IQ4_XS, iq4)),
];

fn iq4(c: &Context) -> Option<&'static BlockType> {
    match c.kind {
        Kind::AttnV => (c.gqa >= 4).then_some(&Q5_K),
        Kind::FfnDown => (!c.has_importance && c.in_first(8)).then_some(&Q5_K),
        _ => None,
    }
}

/// By name, in any case. Only mixes whose types can be written.
pub fn by_name(name: &str) -> Result<&'static Mix> {
    let known = || TABLE.iter().filter(|m| m.default.encode.is_some()).map(|m| m.name).collect::<Vec<_>>().join(" ");
    let mix = TABLE
        .iter()
        .find(|m| m.name.eq_ignore_ascii_case(name))
        .ok_or_else(|| Error::UnknownType { name: name.to_owned(), known: known() })?;
    if mix.default.encode.is_none() {
        return Err(Error::CannotWrite { name: mix.name.to_owned(), known: known() });
    }
    Ok(mix)
}

/// The `general.file_type` of types chosen tensor by tensor: that of the mix named after the type of most weights.
pub fn file_type_of(types: impl Iterator<Item = (&'static BlockType, u64)>) -> u32 {
    let mut weights: Vec<(&BlockType, u64)> = Vec::new();
    for (block, n) in types {
        match weights.iter_mut().find(|(b, _)| *b == block) {
            Some(w) => w.1 += n,
            None => weights.push((block, n)),
        }
    }
    let most = weights.iter().max_by_key(|w| w.1).map(|w| w.0);
    // The last row of a type is the one that the type's name stands for: Q4_K is "Q4_K_M".
    TABLE.iter().rev().find(|m| Some(m.default) == most).map_or(0, |m| m.file_type)
}

/// Whether a tensor is quantized at all: matrices ending in "weight", but no norms and no expert router.
pub fn is_quantizable(name: &str, n_dims: usize) -> bool {
    n_dims >= 2 && name.ends_with("weight") && !name.contains("_norm.weight") && !name.contains("ffn_gate_inp.weight")
}

fn kind_of(name: &str) -> Kind {
    const KINDS: [(&str, Kind); 5] = [
        ("attn_v.weight", Kind::AttnV),
        ("attn_k.weight", Kind::AttnK),
        ("attn_q.weight", Kind::AttnQ),
        ("attn_output.weight", Kind::AttnOutput),
        ("ffn_down", Kind::FfnDown),
    ];
    if name == "output.weight" {
        Kind::Output
    } else if name == "token_embd.weight" {
        Kind::TokenEmbd
    } else {
        KINDS.iter().find(|(part, _)| name.contains(part)).map_or(Kind::Other, |k| k.1)
    }
}

fn layer_of(name: &str) -> u64 {
    name.strip_prefix("blk.").and_then(|r| r.split('.').next()).and_then(|n| n.parse().ok()).unwrap_or(0)
}

impl Mix {
    /// The type of a quantizable tensor. `tied`: the model has no output matrix of its own.
    pub fn type_of(&self, name: &str, row_len: u64, h: &Hparams, tied: bool, has_importance: bool) -> &'static BlockType {
        if self.default.is_plain() {
            return self.default;
        }
        let c = Context {
            kind: kind_of(name),
            layer: layer_of(name),
            n_layers: h.n_layers,
            gqa: h.group(),
            n_experts: h.n_experts,
            has_importance,
        };
        fit_row(self.wanted(&c, row_len, h, tied), row_len)
    }

    fn wanted(&self, c: &Context, row_len: u64, h: &Hparams, tied: bool) -> &'static BlockType {
        if c.kind == Kind::Output || (tied && c.kind == Kind::TokenEmbd) {
            let fits = row_len.is_multiple_of(self.default.block_len as u64);
            return if !fits || *self.default == Q8_0 { &Q8_0 } else { &Q6_K };
        }
        if c.eight_experts() {
            match c.kind {
                Kind::AttnV | Kind::AttnK => return &Q8_0,
                Kind::AttnOutput => return if self.experts_lift_output { &Q5_K } else { self.default },
                _ => {}
            }
        }
        let chosen = (self.rule)(c).unwrap_or(self.default);
        // The 70B class shares one value head among eight query heads, so its attn_v is small and worth more.
        let is_70b = h.arch.lifts_attn_v_at == Some(h.n_layers) && h.n_heads != h.n_kv_heads;
        if is_70b && c.kind == Kind::AttnV && (*chosen == Q3_K || *chosen == Q4_K) {
            return &Q5_K;
        }
        chosen
    }
}

/// Types that replace one whose block does not divide the row.
static FALLBACKS: &[(&BlockType, &BlockType)] =
    &[(&Q4_K, &Q5_0), (&Q5_K, &Q5_1), (&Q6_K, &Q8_0), (&Q2_K, &Q4_0), (&Q3_K, &Q4_0), (&IQ4_XS, &IQ4_NL)];

/// `wanted`, or what stands in for it on rows its block does not divide; F16 where nothing does.
pub fn fit_row(wanted: &'static BlockType, row_len: u64) -> &'static BlockType {
    let fits = |b: &BlockType| row_len.is_multiple_of(b.block_len as u64);
    if fits(wanted) {
        return wanted;
    }
    match FALLBACKS.iter().find(|(from, _)| *from == wanted) {
        Some((_, to)) if fits(to) => to,
        _ => &F16,
    }
}

/// One `--tensor-type REGEX=TYPE`.
#[derive(Debug, Clone)]
pub struct Override {
    pattern: regex::Regex,
    pub block: &'static BlockType,
}

impl Override {
    pub fn parse(given: &str) -> Result<Override> {
        let bad = |reason: String| Error::BadTensorType { given: given.to_owned(), reason };
        let (pattern, name) = given.rsplit_once('=').ok_or_else(|| bad("it must be REGEX=TYPE".into()))?;
        let block = blocks::by_name(name).ok_or_else(|| bad(format!("unknown type '{name}'; known are {}", blocks::decodable_names())))?;
        if block.encode.is_none() {
            return Err(bad(format!("type {name} can be read but not written")));
        }
        let pattern = regex::RegexBuilder::new(pattern).size_limit(1 << 20).build().map_err(|e| bad(e.to_string().replace('\n', " ")))?;
        Ok(Override { pattern, block })
    }

    pub fn applies(&self, name: &str) -> bool {
        self.pattern.is_match(name)
    }
}

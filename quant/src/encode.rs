//! How a tensor's rows become blocks: by the plain search, by a search that
//! weighs errors with an importance matrix, or by rounding against the second
//! moment of the tensor's inputs (`hessian`).

pub mod gptq;
pub mod hessian;

use crate::error::{Error, Result};
use crate::statistics::{MIN_TOKENS, Statistics};
use gguf::blocks::{self, BlockType, DecodeFn, EncodeFn};
use gguf::{Layout, TensorInfo};
use gptq::Whole;
pub use hessian::ROWS;
use hessian::{BLOCK, Factors};
use rayon::prelude::*;

/// By the names users write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// No statistics.
    Search,
    /// Each column's mean square.
    Imatrix,
    /// Blocks of 256 columns' second moments.
    Hessian,
    /// The whole second moment of each matrix of the layers, whose inputs are
    /// those that the quantized layers below give; `Hessian` for the rest.
    Gptq,
}

const NAMES: [(&str, Method); 4] =
    [("search", Method::Search), ("imatrix", Method::Imatrix), ("hessian", Method::Hessian), ("gptq", Method::Gptq)];

impl Method {
    pub fn by_name(name: &str) -> Option<Method> {
        NAMES.iter().find(|(n, _)| *n == name).map(|m| m.1)
    }

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, m)| *m == self).map_or("", |m| m.0)
    }
}

/// What a conversion knows of the model's inputs, and what it does with it.
pub struct Calibration {
    pub statistics: Statistics,
    pub method: Method,
}

impl Calibration {
    /// Reads all that the conversion will ask for, so that what is wrong is
    /// known before the work begins. Returns what the user should know.
    pub fn check(&self, layout: &Layout) -> Result<Vec<String>> {
        if self.method == Method::Search {
            return Ok(vec![]);
        }
        let (mut notes, mut unknown, mut known) = (Vec::new(), Vec::new(), 0);
        for t in layout.tensors().iter().filter(|t| !t.block().is_plain()) {
            let (name, cols, parts) = (t.name(), t.row_len() as usize, n_parts(t));
            let Some((_, tokens)) = self.statistics.importance(name, cols, parts)? else {
                unknown.push(name);
                continue;
            };
            known += 1;
            let rare: Vec<String> = (0..parts).filter(|p| parts > 1 && tokens[*p] < MIN_TOKENS).map(|p| p.to_string()).collect();
            if !rare.is_empty() {
                notes.push(format!("{name}: experts {} were seen too rarely and get the plain search", rare.join(", ")));
            }
            for (part, block) in (0..parts).flat_map(|p| (0..cols.div_ceil(BLOCK)).map(move |b| (p, b))) {
                if wants_blocks(t.block(), Some(self)) && self.statistics.block(name, cols, part, block)?.is_none() {
                    return Err(no_blocks(name));
                }
            }
        }
        if let (0, Some(first)) = (known, unknown.first()) {
            let reason = "the file holds nothing for it nor for any other tensor of this model; it is another model's".into();
            return Err(Error::Statistics { what: (*first).to_owned(), reason });
        }
        if !unknown.is_empty() {
            notes.push(format!("no statistics for {}; the plain search is used there", unknown.join(", ")));
        }
        Ok(notes)
    }
}

fn no_blocks(tensor: &str) -> Error {
    let reason = "the file has no blocks for it; calibrate again, or use --method imatrix".into();
    Error::Statistics { what: tensor.to_owned(), reason }
}

/// Matrices of a tensor: experts of a stack, or 1.
pub fn n_parts(info: &TensorInfo) -> usize {
    info.dims().get(2).map_or(1, |&n| n as usize)
}

type EncodeRows = fn(&Factors, &[f32], &mut [u8]);

macro_rules! grids {
    ($($name:ident $module:ident::$codec:ident),*) => {
        /// The types that can be rounded against a second moment.
        static GRIDS: &[(&BlockType, EncodeRows)] = &[$((&blocks::$name, hessian::encode::<blocks::$module::$codec>)),*];
    };
}
grids!(Q4_0 q4_0::Q4_0, Q4_1 q4_1::Q4_1, Q5_0 q5_0::Q5_0, Q5_1 q5_1::Q5_1, Q8_0 q8_0::Q8_0, Q4_K q4_k::Q4K, Q5_K q5_k::Q5K, Q6_K q6_k::Q6K, IQ4_NL iq4_nl::Iq4Nl, IQ4_XS iq4_xs::Iq4Xs);

fn grid_of(block: &BlockType) -> Option<EncodeRows> {
    GRIDS.iter().find(|(b, _)| *b == block).map(|g| g.1)
}

/// Whether a type is rounded by blocks of second moments under a method.
pub fn wants_blocks(block: &BlockType, calibration: Option<&Calibration>) -> bool {
    calibration.is_some_and(|c| matches!(c.method, Method::Hessian | Method::Gptq)) && grid_of(block).is_some()
}

/// Whether errors can be weighed by blocks of second moments.
pub fn wants_any_blocks(calibration: Option<&Calibration>) -> bool {
    calibration.is_some_and(|c| c.method != Method::Search && c.statistics.has_blocks())
}

/// What is known of one matrix's inputs: of a tensor, or of one expert of a stack, so that memory holds one's factors.
pub struct Inputs {
    /// Each column's mean square.
    means: Option<Vec<f32>>,
    /// Of every 256 columns.
    factors: Option<Vec<Factors>>,
}

impl Inputs {
    /// Nothing where there are no statistics, or too few tokens were seen.
    /// Factors are read where `blocks`, in parallel on the current rayon pool.
    pub fn new(info: &TensorInfo, part: usize, calibration: Option<&Calibration>, blocks: bool) -> Result<Inputs> {
        const NOTHING: Inputs = Inputs { means: None, factors: None };
        let Some(c) = calibration.filter(|c| c.method != Method::Search) else { return Ok(NOTHING) };
        let (name, cols, n_parts) = (info.name(), info.row_len() as usize, n_parts(info));
        let Some((means, tokens)) = c.statistics.importance(name, cols, n_parts)? else { return Ok(NOTHING) };
        if n_parts > 1 && tokens[part] < MIN_TOKENS {
            return Ok(NOTHING);
        }
        let factors = (0..cols.div_ceil(BLOCK)).into_par_iter().map(|b| {
            let moment = c.statistics.block(name, cols, part, b)?.ok_or_else(|| no_blocks(name))?;
            Ok(Factors::new(&moment, BLOCK.min(cols - b * BLOCK)))
        });
        let factors = if blocks { Some(factors.collect::<Result<Vec<_>>>()?) } else { None };
        Ok(Inputs { means: Some(means[part * cols..(part + 1) * cols].to_vec()), factors })
    }

    /// Bytes of the factors of one matrix of rows of `cols`.
    pub fn bytes(cols: u64) -> u64 {
        cols.div_ceil(BLOCK as u64) * (2 * BLOCK * BLOCK * size_of::<f32>()) as u64
    }

    /// What errors of whole rows of `cols` cost, by the best that is known.
    pub fn cost(&self, errors: &[f32], cols: usize) -> f64 {
        let rows = || errors.chunks_exact(cols);
        let Some(factors) = &self.factors else {
            let of =
                |e: &[f32], weight: &dyn Fn(usize) -> f32| e.iter().enumerate().map(|(i, e)| f64::from(weight(i) * e * e)).sum::<f64>();
            return match &self.means {
                Some(means) => rows().map(|e| of(e, &|i| means[i])).sum(),
                None => rows().map(|e| of(e, &|_| 1.0)).sum(),
            };
        };
        factors.iter().enumerate().map(|(b, f)| f.cost(rows().map(|e| &e[b * BLOCK..][..f.n]))).sum()
    }
}

/// Encodes the rows of one matrix in one type.
pub struct MatrixEncoder<'a> {
    plain: EncodeFn,
    cols: usize,
    block: &'static BlockType,
    inputs: &'a Inputs,
    round: Option<(EncodeRows, Against<'a>)>,
}

/// The second moment that rows are rounded against.
enum Against<'a> {
    Blocks(&'a [Factors]),
    Whole(&'a Whole, DecodeFn),
}

impl<'a> MatrixEncoder<'a> {
    pub fn new(block: &'static BlockType, cols: usize, inputs: &'a Inputs) -> Result<MatrixEncoder<'a>> {
        let plain = kernels::encode::encoder(block).ok_or(gguf::Error::CannotEncode { type_name: block.name })?;
        let round = grid_of(block).zip(inputs.factors.as_deref().map(Against::Blocks));
        Ok(MatrixEncoder { plain, cols, block, inputs, round })
    }

    /// Rounding against `whole` where the type can be.
    pub fn against(self, whole: &'a Whole) -> MatrixEncoder<'a> {
        let decode = kernels::encode::decoder(self.block);
        MatrixEncoder { round: grid_of(self.block).zip(decode.map(|d| Against::Whole(whole, d))), ..self }
    }

    /// Rows that `encode` is best given at a time.
    pub fn rows_at_once(&self, chunk: usize) -> usize {
        if self.round.is_some() { 4 * ROWS } else { (chunk / self.cols).max(1) }
    }

    /// Encodes whole rows.
    pub fn encode(&self, x: &[f32], out: &mut [u8]) {
        match (&self.round, &self.inputs.means) {
            (Some((encode, Against::Blocks(factors))), _) => self.round(*encode, factors, x, out),
            (Some((encode, Against::Whole(whole, decode))), _) => whole.encode((self.block, *encode, *decode), x, out),
            (None, Some(means)) if !self.block.is_plain() => (self.plain)(x, Some(&means.repeat(x.len() / self.cols)), out),
            _ => (self.plain)(x, None, out),
        }
    }

    fn round(&self, encode: EncodeRows, factors: &[Factors], x: &[f32], out: &mut [u8]) {
        let rows = x.len() / self.cols;
        let row_bytes = self.block.bytes_for(self.cols as u64) as usize;
        let (mut values, mut bytes) = (vec![0.0f32; ROWS * BLOCK], vec![0u8; ROWS * self.block.bytes_for(BLOCK as u64) as usize]);
        for (b, f) in factors.iter().enumerate() {
            let n_bytes = self.block.bytes_for(f.n as u64) as usize;
            let from = self.block.bytes_for((b * BLOCK) as u64) as usize;
            for first in (0..rows).step_by(ROWS) {
                // The last row fills lanes that have none of their own.
                for (r, values) in values.chunks_exact_mut(f.n).take(ROWS).enumerate() {
                    let row = (first + r).min(rows - 1);
                    values.copy_from_slice(&x[row * self.cols + b * BLOCK..][..f.n]);
                }
                encode(f, &values[..ROWS * f.n], &mut bytes[..ROWS * n_bytes]);
                for (r, bytes) in bytes.chunks_exact(n_bytes).take(ROWS.min(rows - first)).enumerate() {
                    out[(first + r) * row_bytes + from..][..n_bytes].copy_from_slice(bytes);
                }
            }
        }
    }
}

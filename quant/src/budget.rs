//! Which type each tensor gets so that a file is no larger than asked and its
//! error the least: every tensor is measured in every type that fits its
//! rows, and Lagrange's multiplier decides what a byte must buy.
//!
//! 1. Measure: a sample of each matrix's rows is encoded in each type; an
//!    error e costs eᵀ·H·e (`Inputs::cost`). Where the statistics say what a
//!    unit of that is worth in KL divergence (`Statistics::sensitivity`), it is
//!    multiplied with it; else each tensor counts by its error relative to its output.
//! 2. For a price λ of a byte each tensor takes the type of least cost + λ·bytes,
//!    whatever the others take (Everett 1963). λ is the least whose sum of bytes fits.
//! 3. What room is left goes to the changes that lower the cost most a byte.
//!
//! Errors alone say little about what tensors are worth: on rustdoc-9m a file
//! chosen by them was 1.35 times worse than the standard mix of its size. So
//! without sensitivities step 2 is the largest standard mix that fits.

use crate::convert::Progress;
use crate::encode::{Calibration, Inputs, MatrixEncoder, ROWS, n_parts, wants_any_blocks};
use crate::error::{Error, Result};
use crate::mix;
use crate::plan::{Plan, Values};
use gguf::{BlockType, Layout, ModelFile, TensorInfo, Value, blocks};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Rows of a matrix that are measured, spread evenly.
const SAMPLE: usize = 512;
/// Where a file keeps each tensor's type as it was chosen: "NAME=TYPE" strings.
pub const RECIPE: &str = "gristmill.recipe";

/// What a byte may be spent on.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// Of the whole file.
    FileBytes(u64),
    BitsPerWeight(f64),
    /// Of the tensors that a GPU holds: all, but not an embedding that is not the head too.
    DeviceBytes(u64),
}

#[derive(Debug, Clone)]
pub struct Choice {
    pub block: &'static BlockType,
    pub bytes: u64,
    pub cost: f64,
}

/// A tensor's choices, by rising bytes.
#[derive(Debug, Clone)]
pub struct Choices {
    pub tensor: String,
    pub weights: u64,
    pub choices: Vec<Choice>,
}

/// Measures every tensor of `plan` that is quantized; `fixed` ones in their planned type only.
pub fn measure(plan: &Plan, fixed: impl Fn(&str) -> bool, threads: usize, progress: &dyn Progress) -> Result<Vec<Choices>> {
    let pool = crate::convert::pool(threads)?;
    let tensors = plan.layout().tensors().iter().enumerate();
    let quantized = tensors.filter(|(_, t)| mix::is_quantizable(t.name(), t.dims().len()));
    quantized
        .map(|(i, t)| {
            let candidates = if fixed(t.name()) { vec![t.block()] } else { candidates(t.row_len()) };
            let costs = pool.install(|| costs(plan, i, &candidates, progress))?;
            let mut choices: Vec<Choice> = candidates
                .into_iter()
                .zip(costs)
                .map(|(block, cost)| Choice { block, bytes: t.n_rows() * block.bytes_for(t.row_len()), cost })
                .collect();
            choices.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost)));
            Ok(Choices { tensor: t.name().to_owned(), weights: t.n_elements(), choices })
        })
        .collect()
}

/// Types that can be written in rows of this length.
fn candidates(row_len: u64) -> Vec<&'static BlockType> {
    let fits = |b: &&BlockType| b.encode.is_some() && !b.is_plain() && row_len.is_multiple_of(b.block_len as u64);
    let found: Vec<&BlockType> = blocks::table().filter(fits).collect();
    if found.is_empty() { vec![&blocks::F16] } else { found }
}

/// Cost of tensor `i` in each candidate.
fn costs(plan: &Plan, i: usize, candidates: &[&'static BlockType], progress: &dyn Progress) -> Result<Vec<f64>> {
    let info = &plan.layout().tensors()[i];
    let (cols, parts) = (info.row_len() as usize, n_parts(info));
    let values = plan.values(i)?;
    let rows_of_part = info.n_rows() as usize / parts;
    let sampled: Vec<usize> = sample(rows_of_part);
    let scale = rows_of_part as f64 / (sampled.len() * ROWS).min(rows_of_part) as f64;
    let (mut sums, mut energy) = (vec![0.0; candidates.len()], 0.0);
    for part in 0..parts {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        let inputs = Inputs::new(info, part, plan.calibration(), wants_any_blocks(plan.calibration()))?;
        let measured = sampled
            .par_iter()
            .map(|first| measure_rows(&values, part * rows_of_part + first, rows_of_part - first, cols, candidates, &inputs));
        for group in measured.collect::<Result<Vec<_>>>()? {
            sums.iter_mut().zip(&group.0).for_each(|(s, c)| *s += c * scale);
            energy += group.1 * scale;
        }
        progress.advanced(info.name(), info.n_elements() / parts as u64);
    }
    let worth = match plan.calibration().map(|c| c.statistics.sensitivity(info.name())) {
        Some(Some(s)) => s,
        _ => 1.0 / energy.max(f64::MIN_POSITIVE),
    };
    Ok(sums.into_iter().map(|c| c * worth).collect())
}

/// First rows of the groups of ROWS that are measured.
fn sample(rows: usize) -> Vec<usize> {
    let groups = rows.div_ceil(ROWS);
    let wanted = groups.min(SAMPLE / ROWS);
    (0..wanted).map(|g| g * groups / wanted * ROWS).collect()
}

/// Costs of up to ROWS rows in each candidate, and of losing them whole.
fn measure_rows(
    values: &Values,
    first: usize,
    left: usize,
    cols: usize,
    candidates: &[&'static BlockType],
    inputs: &Inputs,
) -> Result<(Vec<f64>, f64)> {
    let n = ROWS.min(left);
    let mut x = vec![0.0f32; n * cols];
    for (r, x) in x.chunks_exact_mut(cols).enumerate() {
        values.read(first + r, x);
    }
    let costs = candidates
        .iter()
        .map(|block| encode_and_measure(block, cols, inputs, &x).map(|measured| measured.1))
        .collect::<Result<Vec<_>>>()?;
    Ok((costs, inputs.cost(&x, cols)))
}

/// Whole rows in `block`: their bytes, and what their errors cost.
fn encode_and_measure(block: &'static BlockType, cols: usize, inputs: &Inputs, x: &[f32]) -> Result<(Vec<u8>, f64)> {
    let encoder = MatrixEncoder::new(block, cols, inputs)?;
    let mut bytes = vec![0u8; block.bytes_for(x.len() as u64) as usize];
    encoder.encode(x, &mut bytes);
    let decode = kernels::encode::decoder(block).ok_or(gguf::Error::CannotEncode { type_name: block.name })?;
    let mut errors = vec![0.0f32; x.len()];
    decode(&bytes, &mut errors);
    errors.iter_mut().zip(x).for_each(|(v, w)| *v = w - *v);
    Ok((bytes, inputs.cost(&errors, cols)))
}

/// A matrix in the 4-bit type that its worth is measured with: type, bytes, and what its errors cost.
/// `read` decodes rows from the given one on.
pub fn probe(
    info: &TensorInfo,
    part: usize,
    calibration: &Calibration,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<(&'static BlockType, Vec<u8>, f64)> {
    let block = mix::fit_row(&blocks::Q4_K, info.row_len());
    let (cols, rows) = (info.row_len() as usize, info.n_rows() as usize / n_parts(info));
    let inputs = Inputs::new(info, part, Some(calibration), wants_any_blocks(Some(calibration)))?;
    let groups = (0..rows.div_ceil(ROWS)).into_par_iter().map(|g| {
        let mut x = vec![0.0; ROWS.min(rows - g * ROWS) * cols];
        read(g * ROWS, &mut x);
        encode_and_measure(block, cols, &inputs, &x)
    });
    let (mut bytes, mut cost) = (Vec::new(), 0.0);
    for (b, c) in groups.collect::<Result<Vec<_>>>()? {
        bytes.extend(b);
        cost += c;
    }
    Ok((block, bytes, cost))
}

/// `plan` with the types of least cost that keep to `target`, and their summed cost.
pub fn apply(plan: Plan, choices: &[Choices], target: Target) -> Result<(Plan, f64)> {
    let (layout, cost) = layout(&plan, choices, target)?;
    Ok((plan.with_layout(layout), cost))
}

/// The layout of `apply`.
pub fn layout(plan: &Plan, choices: &[Choices], target: Target) -> Result<(Layout, f64)> {
    let tied = plan.is_tied();
    let counts = |name: &str| !matches!(target, Target::DeviceBytes(_)) || tied || name != "token_embd.weight";
    let measured = plan.calibration().is_some_and(|c| c.statistics.has_sensitivities());
    let by_name: HashMap<&str, &Choices> = choices.iter().map(|c| (c.tensor.as_str(), c)).collect();
    let chosen_bytes = |t: &TensorInfo| if by_name.contains_key(t.name()) { 0 } else { t.n_bytes() };
    // What no choice changes.
    let fixed: u64 = plan.layout().tensors().iter().filter(|t| counts(t.name())).map(chosen_bytes).sum();
    let asked = match target {
        Target::FileBytes(n) | Target::DeviceBytes(n) => n,
        Target::BitsPerWeight(bits) => (plan.total_weights() as f64 * bits / 8.0) as u64,
    };
    // Header and padding depend on the choice by a few bytes, so what they take is found by trying.
    let mut overhead = 0;
    for _ in 0..8 {
        let limit = asked.saturating_sub(fixed + overhead);
        let standard = if measured { None } else { largest_mix(plan, choices, &counts, limit)? };
        let picked = solve(choices, &counts, limit, standard)
            .map_err(|smallest| Error::TargetTooSmall { asked, smallest: smallest + fixed + overhead })?;
        let types = choices.iter().zip(&picked).map(|(c, &k)| (c.tensor.clone(), c.choices[k].block)).collect();
        let layout = retyped(plan, &types)?;
        let bytes: u64 = layout.tensors().iter().filter(|t| counts(t.name())).map(TensorInfo::n_bytes).sum();
        let taken = match target {
            Target::FileBytes(_) => layout.file_bytes(),
            Target::BitsPerWeight(_) | Target::DeviceBytes(_) => bytes,
        };
        if taken <= asked {
            let cost = choices.iter().zip(&picked).map(|(c, &k)| c.choices[k].cost).sum();
            return Ok((layout, cost));
        }
        overhead = overhead.max(taken - bytes) + if overhead >= taken - bytes { 32 * choices.len() as u64 } else { 0 };
    }
    Err(Error::TargetTooSmall { asked, smallest: asked + 1 })
}

/// The layout of `plan` with other types, which it then says are its recipe.
fn retyped(plan: &Plan, types: &HashMap<String, &'static BlockType>) -> Result<Layout> {
    let chosen: Vec<_> = plan.layout().tensors().iter().filter_map(|t| Some((t, *types.get(t.name())?))).collect();
    let recipe = chosen.iter().map(|(t, block)| format!("{}={}", t.name(), block.name)).collect();
    let file_type = mix::file_type_of(chosen.iter().map(|(t, block)| (*block, t.n_elements())));
    plan.layout_with(
        |t| types.get(t.name()).copied().unwrap_or(t.block()),
        |metadata| {
            metadata.set(RECIPE, Value::Array(gguf::Array::String(recipe)));
            metadata.set_u32("general.file_type", file_type);
        },
    )
}

/// The choices of the standard mix of most bytes within `limit`; None if none fits.
fn largest_mix(plan: &Plan, choices: &[Choices], counts: &dyn Fn(&str) -> bool, limit: u64) -> Result<Option<Vec<usize>>> {
    let mut best: Option<(u64, Vec<usize>)> = None;
    // The mixes of 32-value types are no better than those of K-quants at any size.
    for mix in mix::TABLE.iter().filter(|m| m.default.block_len == 256) {
        let layout = plan.layout_as(mix, &[])?;
        let types: HashMap<&str, &BlockType> = layout.tensors().iter().map(|t| (t.name(), t.block())).collect();
        let pick = |c: &Choices| match c.choices.len() {
            1 => Some(0),
            _ => c.choices.iter().position(|o| o.block == types[c.tensor.as_str()]),
        };
        let Some(picked) = choices.iter().map(pick).collect::<Option<Vec<usize>>>() else { continue };
        let bytes = choices.iter().zip(&picked).filter(|(c, _)| counts(&c.tensor)).map(|(c, &k)| c.choices[k].bytes).sum();
        if bytes <= limit && best.as_ref().is_none_or(|b| bytes > b.0) {
            best = Some((bytes, picked));
        }
    }
    Ok(best.map(|b| b.1))
}

/// `plan` with each tensor's type as the file at `path` has it: in its recipe, or else its tensors.
pub fn replay(plan: Plan, path: &Path) -> Result<Plan> {
    let file = ModelFile::open(path)?;
    let known = |name: &str| blocks::by_name(name).filter(|b| b.encode.is_some());
    let mut types: HashMap<String, &'static BlockType> = HashMap::new();
    match file.metadata().opt_strings(RECIPE).map_err(|e| e.in_file(path))? {
        Some(recipe) => {
            for entry in recipe {
                let parts = entry.rsplit_once('=').and_then(|(tensor, name)| Some((tensor, known(name)?)));
                let (tensor, block) =
                    parts.ok_or_else(|| Error::file(path, format!("its recipe has an entry '{entry}' that is no NAME=TYPE")))?;
                types.insert(tensor.to_owned(), block);
            }
        }
        None => types.extend(file.tensors().filter_map(|t| Some((t.info.name().to_owned(), known(t.info.block().name)?)))),
    }
    let quantized = |t: &TensorInfo| mix::is_quantizable(t.name(), t.dims().len());
    if let Some(t) = plan.layout().tensors().iter().find(|t| quantized(t) && !types.contains_key(t.name())) {
        return Err(Error::file(path, format!("it names no type for tensor '{}' that can be written; it is another model's", t.name())));
    }
    let fitting = |t: &TensorInfo| (t.name().to_owned(), mix::fit_row(types[t.name()], t.row_len()));
    let types = plan.layout().tensors().iter().filter(|t| quantized(t)).map(fitting).collect();
    let layout = retyped(&plan, &types)?;
    Ok(plan.with_layout(layout))
}

/// Which choice each tensor takes so that the bytes of those that count stay
/// within `limit`, from `start` on if there is one; else the fewest bytes there can be.
fn solve(
    choices: &[Choices],
    counts: &dyn Fn(&str) -> bool,
    limit: u64,
    start: Option<Vec<usize>>,
) -> std::result::Result<Vec<usize>, u64> {
    let bytes = |i: usize, k: usize| if counts(&choices[i].tensor) { choices[i].choices[k].bytes } else { 0 };
    let total = |picked: &[usize]| picked.iter().enumerate().map(|(i, &k)| bytes(i, k)).sum::<u64>();
    let at = |price: f64| -> Vec<usize> {
        let of = |i: usize, k: usize| choices[i].choices[k].cost + price * bytes(i, k) as f64;
        (0..choices.len())
            .map(|i| {
                (0..choices[i].choices.len())
                    .min_by(|&a, &b| of(i, a).total_cmp(&of(i, b)).then(bytes(i, a).cmp(&bytes(i, b))))
                    .unwrap_or(0)
            })
            .collect()
    };
    let smallest: u64 = (0..choices.len()).map(|i| (0..choices[i].choices.len()).map(|k| bytes(i, k)).min().unwrap_or(0)).sum();
    if smallest > limit {
        return Err(smallest);
    }
    let given = start.is_some();
    let mut picked = start.unwrap_or_else(|| at(0.0));
    if !given && total(&picked) > limit {
        // At the highest price every tensor takes its fewest bytes.
        let (mut low, mut high) = (f64::MIN_POSITIVE, 1.0);
        while total(&at(high)) > limit {
            high *= 1e3;
        }
        for _ in 0..200 {
            let middle = (low * high).sqrt();
            if total(&at(middle)) > limit { low = middle } else { high = middle }
        }
        picked = at(high);
    }
    loop {
        let room = limit - total(&picked);
        let mut best = (0.0, None);
        for (i, c) in choices.iter().enumerate() {
            for k in 0..c.choices.len() {
                let (more, gain) = (bytes(i, k).saturating_sub(bytes(i, picked[i])), c.choices[picked[i]].cost - c.choices[k].cost);
                let rate = gain / more.max(1) as f64;
                if more <= room && gain > 0.0 && rate > best.0 {
                    best = (rate, Some((i, k)));
                }
            }
        }
        let Some((i, k)) = best.1 else { return Ok(picked) };
        picked[i] = k;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(seed: u64, n: usize) -> Vec<Choices> {
        let mut r = crate::synth::Random(seed);
        let mut next = || f64::from(r.normal().abs()) + 0.1;
        let sizes = [(&blocks::Q4_K, 144), (&blocks::Q5_K, 176), (&blocks::Q6_K, 210), (&blocks::Q8_0, 272)];
        let one = |i: usize| {
            let (rows, worth) = (1 + (next() * 5.0) as u64, next());
            let of = |k: usize| worth * rows as f64 * 0.25f64.powi(k as i32);
            let choices = sizes.iter().enumerate().map(|(k, (block, b))| Choice { block, bytes: rows * b, cost: of(k) }).collect();
            Choices { tensor: format!("t{i}"), weights: rows * 256, choices }
        };
        (0..n).map(one).collect()
    }

    /// Beside trying every combination: within the limit, and near the best there is.
    #[test]
    fn solutions_fit_and_are_near_the_best() {
        for seed in 0..20 {
            let c = choices(seed, 6);
            let least: u64 = c.iter().map(|c| c.choices[0].bytes).sum();
            for limit in [least, least + 100, least * 5 / 4, least * 3 / 2, least * 3] {
                let picked = solve(&c, &|_| true, limit, None).unwrap();
                let sum = |picked: &[usize]| picked.iter().zip(&c).map(|(&k, c)| c.choices[k].bytes).sum::<u64>();
                let cost = |picked: &[usize]| picked.iter().zip(&c).map(|(&k, c)| c.choices[k].cost).sum::<f64>();
                assert!(sum(&picked) <= limit);
                let all = (0..4usize.pow(6)).map(|n| (0..6).map(|i| n / 4usize.pow(i) % 4).collect::<Vec<_>>());
                let best = all.filter(|p| sum(p) <= limit).map(|p| cost(&p)).fold(f64::INFINITY, f64::min);
                assert!(cost(&picked) <= best * 1.35 + 1e-12, "seed {seed}, {limit}: {} beside {best}", cost(&picked));
            }
            assert_eq!(solve(&c, &|_| true, least - 1, None), Err(least));
        }
    }

    /// What does not count takes its best type.
    #[test]
    fn what_does_not_count_is_free() {
        let c = choices(3, 4);
        let least: u64 = c[1..].iter().map(|c| c.choices[0].bytes).sum();
        let picked = solve(&c, &|name| name != "t0", least, None).unwrap();
        assert_eq!(picked, [3, 0, 0, 0]);
    }
}

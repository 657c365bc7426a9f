//! How the threads share a matrix that is read once: each has a range of the
//! output columns (rows of weights) of its own, and reads it as [`STREAMS`]
//! runs side by side, from their beginnings to their ends, in *strips*: a few
//! columns of every run. Strips grow smaller towards the end of a range, where
//! other threads help, so that all end together and few strips are handed out.

use super::Pool;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Runs that a thread reads side by side: one stream a core reaches two thirds
/// of the bandwidth that eight do.
pub const STREAMS: usize = 4;

/// A strip is one in so many of what is left of a range.
const SHARE: usize = 4;

/// An output, tokens × columns, to be filled in strips.
pub struct Striped<'a> {
    data: *mut f32,
    n_tokens: usize,
    cols: usize,
    /// Columns of each run that a strip has, unless fewer are left.
    columns: Range<usize>,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write through it only by way of strips, which are disjoint.
unsafe impl Sync for Striped<'_> {}

impl<'a> Striped<'a> {
    /// In strips of `least` to `most` columns a run.
    pub fn new(data: &'a mut [f32], n_tokens: usize, cols: usize, least: usize, most: usize) -> Self {
        assert!(n_tokens.checked_mul(cols).is_some_and(|n| n <= data.len()), "the buffer is too small for {n_tokens} × {cols}");
        let least = least.max(1);
        Striped { data: data.as_mut_ptr(), n_tokens, cols, columns: least..most.max(least), lifetime: PhantomData }
    }

    /// Columns of a thread's range.
    fn range(&self, owner: usize, threads: usize) -> Range<usize> {
        owner * self.cols / threads..(owner + 1) * self.cols / threads
    }

    /// Steps of the range: a column of every run, and with the last what is left over.
    fn steps(&self, owner: usize, threads: usize) -> usize {
        let n = self.range(owner, threads).len();
        (n / STREAMS).max(n.min(1))
    }
}

/// Exclusive access to some output columns of all tokens.
pub struct Strip<'a> {
    /// Equally many columns each.
    runs: [Range<usize>; STREAMS],
    rest: Range<usize>,
    out: &'a Striped<'a>,
}

impl<'a> Strip<'a> {
    /// Steps `steps` of a thread's range.
    ///
    /// # Safety
    /// Each step is asked for at most once while the matrix is borrowed, so that strips are disjoint.
    unsafe fn new(out: &'a Striped<'a>, range: Range<usize>, steps: Range<usize>) -> Self {
        let length = range.len() / STREAMS;
        let steps = steps.start.min(length)..steps.end.min(length);
        let runs = std::array::from_fn(|k| range.start + k * length + steps.start..range.start + k * length + steps.end);
        let rest = if steps.end == length { range.start + STREAMS * length..range.end } else { range.end..range.end };
        Strip { runs, rest, out }
    }

    pub fn n_tokens(&self) -> usize {
        self.out.n_tokens
    }

    /// The columns of each run, equally many.
    pub fn runs(&self) -> [Range<usize>; STREAMS] {
        self.runs.clone()
    }

    /// Fewer than [`STREAMS`] columns, of the end of a range.
    pub fn rest(&self) -> Range<usize> {
        self.rest.clone()
    }

    /// Of token `t`, column `i` of each run.
    #[inline(always)]
    pub fn put(&mut self, t: usize, i: usize, y: [f32; STREAMS]) {
        assert!(t < self.out.n_tokens && i < self.runs[0].len());
        for (run, y) in self.runs.iter().zip(y) {
            // SAFETY: within the matrix, as the runs are (`new`), and of this run (just checked: they are equally long);
            // the buffer holds tokens × columns (checked by Striped::new), and these are no other strip's.
            unsafe { *self.out.data.add(t * self.out.cols + run.start + i) = y };
        }
    }

    pub fn rest_mut(&mut self, t: usize) -> &mut [f32] {
        assert!(t < self.out.n_tokens && self.rest.end <= self.out.cols);
        // SAFETY: within the matrix (just checked), as above.
        unsafe { std::slice::from_raw_parts_mut(self.out.data.add(t * self.out.cols + self.rest.start), self.rest.len()) }
    }
}

impl Pool {
    /// Calls `f(matrix, strip)` until every column of every matrix was in one strip.
    pub fn for_each_strip(&self, matrices: &mut [Striped<'_>], f: impl Fn(usize, &mut Strip<'_>) + Sync) {
        let threads = self.n_threads();
        let matrices = &*matrices;
        // Of each thread's steps, where each matrix's end.
        let ends: Vec<Vec<usize>> = (0..threads)
            .map(|owner| {
                let mut end = 0;
                matrices
                    .iter()
                    .map(|m| {
                        end += m.steps(owner, threads);
                        end
                    })
                    .collect()
            })
            .collect();
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        self.next.iter().for_each(|next| next.0.store(0, Ordering::Relaxed));
        self.run_in_turn(&turn, &|own| {
            for owner in (own..threads).chain(0..own) {
                let (ends, next) = (&ends[owner], &self.next[owner].0);
                let mut at = next.load(Ordering::Relaxed);
                while let Some(which) = ends.iter().position(|&end| at < end) {
                    let m = &matrices[which];
                    let left = ends[ends.len() - 1] - at;
                    let n = (left / SHARE).clamp(m.columns.start, m.columns.end).min(ends[which] - at);
                    if let Err(taken) = next.compare_exchange_weak(at, at + n, Ordering::Relaxed, Ordering::Relaxed) {
                        at = taken;
                        continue;
                    }
                    let first = at - if which > 0 { ends[which - 1] } else { 0 };
                    // SAFETY: the exchange gives out each step once.
                    let mut strip = unsafe { Strip::new(m, m.range(owner, threads), first..first + n) };
                    f(which, &mut strip);
                    at = next.load(Ordering::Relaxed);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_cover_a_matrix_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            for (n_tokens, cols) in [(1, 0), (1, 1), (2, 3), (1, 4), (3, 29), (1, 1000)] {
                let mut data = [vec![0.0; n_tokens * cols], vec![0.0; n_tokens * 5]];
                let filled = std::sync::atomic::AtomicUsize::new(0);
                let [a, b] = &mut data;
                pool.for_each_strip(&mut [Striped::new(a, n_tokens, cols, 2, 9), Striped::new(b, n_tokens, 5, 1, 1)], |_, strip| {
                    for t in 0..strip.n_tokens() {
                        let [first, ..] = strip.runs();
                        (0..first.len()).for_each(|i| strip.put(t, i, [1.0; STREAMS]));
                        strip.rest_mut(t).iter_mut().for_each(|x| *x += 1.0);
                        filled.fetch_add(STREAMS * first.len() + strip.rest().len(), Ordering::Relaxed);
                    }
                });
                assert!(data.iter().flatten().all(|&x| x == 1.0), "{threads} threads, {n_tokens} × {cols}");
                assert_eq!(filled.into_inner(), n_tokens * (cols + 5), "{threads} threads, {n_tokens} × {cols}");
            }
        }
    }
}

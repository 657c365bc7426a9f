//! SentencePiece BPE: characters merge pairwise, the pair whose concatenation
//! has the highest score first, the leftmost of equals; what is left and no
//! token falls back to bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

const BYTE: i64 = 6;
/// Types whose spelling may arise by merging: normal, and unused (which is then cut again).
const MERGEABLE: [i64; 3] = [1, 4, 5];

pub(super) struct Spm {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    unused: Vec<bool>,
    bytes: Option<Vec<u32>>,
    unknown: u32,
}

/// "<0x0A>" → 10.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// A run of characters: part of a doubly linked list over the text.
struct Symbol {
    start: usize,
    len: usize,
    previous: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}

impl Spm {
    pub fn new(tokens: &[String], types: &[i64], scores: Vec<f32>, unknown: u32) -> Spm {
        let mut ids = HashMap::with_capacity(tokens.len());
        let mut bytes = vec![u32::MAX; 256];
        for (i, (t, k)) in tokens.iter().zip(types).enumerate() {
            if MERGEABLE.contains(k) {
                ids.entry(t.clone()).or_insert(i as u32);
            }
            if *k == BYTE
                && let Some(b) = byte_of(t)
            {
                bytes[usize::from(b)] = i as u32;
            }
        }
        let bytes = bytes.iter().all(|&b| b != u32::MAX).then_some(bytes);
        Spm { ids, scores, unused: types.iter().map(|&k| k == 5).collect(), bytes, unknown }
    }

    /// Appends the ids of `text`, spaces shown as "▁", with one more before it if `prefix`.
    pub fn encode(&self, text: &str, prefix: bool, out: &mut Vec<u32>) {
        let mut shown = String::with_capacity(text.len() + 3);
        if prefix {
            shown.push('\u{2581}');
        }
        shown.extend(text.chars().map(|c| if c == ' ' { '\u{2581}' } else { c }));
        let mut symbols: Vec<Symbol> = shown
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), previous: i.wrapping_sub(1), next: i + 1 })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        // Which two pieces a merged one was made of, for cutting unused tokens again.
        let mut made_of: HashMap<(usize, usize), usize> = HashMap::new();
        let mut queue = BinaryHeap::new();
        let offer = |symbols: &[Symbol], left: usize, right: usize, queue: &mut BinaryHeap<Pair>| {
            if left == NONE || right == NONE {
                return;
            }
            let (l, r) = (&symbols[left], &symbols[right]);
            let len = l.len + r.len;
            if let Some(&id) = self.ids.get(&shown[l.start..l.start + len]) {
                queue.push(Pair { score: self.scores[id as usize], left, right, len });
            }
        };
        for i in 1..symbols.len() {
            offer(&symbols, i - 1, i, &mut queue);
        }
        while let Some(p) = queue.pop() {
            let (l, r) = (&symbols[p.left], &symbols[p.right]);
            // A pair is stale once either side was merged elsewhere.
            if l.len == 0 || r.len == 0 || l.len + r.len != p.len {
                continue;
            }
            made_of.insert((l.start, p.len), l.len);
            let next = r.next;
            symbols[p.left].len = p.len;
            symbols[p.left].next = next;
            symbols[p.right].len = 0;
            if next != NONE {
                symbols[next].previous = p.left;
            }
            let previous = symbols[p.left].previous;
            offer(&symbols, previous, p.left, &mut queue);
            offer(&symbols, p.left, next, &mut queue);
        }
        let mut at = if symbols.is_empty() { NONE } else { 0 };
        while at != NONE {
            let s = &symbols[at];
            self.emit(&shown, s.start, s.len, &made_of, out);
            at = s.next;
        }
    }

    fn emit(&self, text: &str, start: usize, len: usize, made_of: &HashMap<(usize, usize), usize>, out: &mut Vec<u32>) {
        // Depth is bounded by the length of the longest token, as each cut is a former merge.
        let piece = &text[start..start + len];
        match self.ids.get(piece) {
            Some(&id) if !self.unused[id as usize] => out.push(id),
            found => match made_of.get(&(start, len)) {
                Some(&left) => {
                    self.emit(text, start, left, made_of, out);
                    self.emit(text, start + left, len - left, made_of, out);
                }
                None => match (&self.bytes, found) {
                    (Some(bytes), _) => out.extend(piece.bytes().map(|b| bytes[usize::from(b)])),
                    (None, Some(&id)) => out.push(id),
                    (None, None) => out.push(self.unknown),
                },
            },
        }
    }
}

//! Byte-level BPE by id, as tiktoken does: of all adjacent pieces, the pair
//! whose concatenation is the token of lowest id merges first, the leftmost of
//! equals. Exact for tekken, whose ids are ranks.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

pub(super) struct ById {
    ids: HashMap<Vec<u8>, u32>,
}

/// The byte a character of GPT-2's printable form stands for.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let c = c as u32;
    if c < 0x100 && printable(c) {
        return Some(c as u8);
    }
    (0..256u32).filter(|&b| !printable(b)).nth(c.checked_sub(0x100)? as usize).map(|b| b as u8)
}

/// A token's bytes. What is not in the printable form (added tokens) is kept as UTF-8.
pub(super) fn from_byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

const NONE: usize = usize::MAX;

impl ById {
    pub fn new(tokens: &[String]) -> ById {
        let table: HashMap<char, u8> = (0..0x144).filter_map(char::from_u32).filter_map(|c| Some((c, byte_of(c)?))).collect();
        let bytes = |t: &String| t.chars().map(|c| table.get(&c).copied()).collect::<Option<Vec<u8>>>();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (i, t) in tokens.iter().enumerate() {
            // Special tokens come first and are spelled like text; a later, ranked token of the same bytes wins.
            if let Some(b) = bytes(t) {
                ids.insert(b, i as u32);
            }
        }
        ById { ids }
    }

    pub fn encode(&self, piece: &[u8], out: &mut Vec<u32>) {
        if let Some(&id) = self.ids.get(piece) {
            return out.push(id);
        }
        // Pieces as a linked list over byte positions: `end[i]` of the piece starting at i.
        let n = piece.len();
        let mut end: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut queue = BinaryHeap::new();
        let offer = |end: &[usize], left: usize, queue: &mut BinaryHeap<Reverse<(u32, usize, usize, usize)>>| {
            if left == NONE || end[left] >= n {
                return;
            }
            let (middle, right) = (end[left], end[end[left]]);
            if let Some(&id) = self.ids.get(&piece[left..right]) {
                queue.push(Reverse((id, left, middle, right)));
            }
        };
        for i in 0..n {
            offer(&end, i, &mut queue);
        }
        while let Some(Reverse((_, left, middle, right))) = queue.pop() {
            // Stale once either piece was merged elsewhere.
            if end[left] != middle || end[middle] != right {
                continue;
            }
            end[left] = right;
            end[middle] = NONE;
            if right < n {
                previous[right] = left;
            }
            offer(&end, previous[left], &mut queue);
            offer(&end, left, &mut queue);
        }
        let mut at = 0;
        while at < n {
            match self.ids.get(&piece[at..end[at]]) {
                Some(&id) => out.push(id),
                // A vocabulary without all 256 bytes loses the byte; there is nothing to say it with.
                None => debug_assert!(false, "byte {:#04x} has no token", piece[at]),
            }
            at = end[at];
        }
    }
}

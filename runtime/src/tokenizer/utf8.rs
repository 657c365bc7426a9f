//! Bytes as they come, out as whole characters only.

/// Holds back the start of a character until the rest arrives.
#[derive(Debug, Default)]
pub struct Utf8Stream {
    held: Vec<u8>,
}

impl Utf8Stream {
    /// The characters completed by `bytes`. Bytes that can never become a character come out as U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut out = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(s) => {
                    out.push_str(s);
                    self.held.clear();
                    return out;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.held[..valid]));
                    match e.error_len() {
                        None => {
                            self.held.drain(..valid);
                            return out;
                        }
                        Some(n) => {
                            out.push('\u{fffd}');
                            self.held.drain(..valid + n);
                        }
                    }
                }
            }
        }
    }

    /// What is left at the end: U+FFFD if a character was never completed.
    pub fn finish(&mut self) -> String {
        let left = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&left).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_never_split() {
        let text = "né 日本 🦙👩‍👩‍👧 e\u{301}";
        for step in 1..5 {
            let mut s = Utf8Stream::default();
            let mut out = String::new();
            for c in text.as_bytes().chunks(step) {
                out += &s.push(c);
            }
            assert_eq!(out + &s.finish(), text);
        }
    }

    #[test]
    fn broken_bytes_are_replaced() {
        let mut s = Utf8Stream::default();
        assert_eq!(s.push(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(s.push(b"\xe6\x97"), "");
        assert_eq!(s.finish(), "\u{fffd}");
    }
}

//! The few fields of a SentencePiece model (protobuf `ModelProto`) that a
//! vocabulary needs: pieces with score and type, and two normalizer flags.
//!
//! ```text
//! ModelProto      { repeated SentencePiece pieces = 1; NormalizerSpec normalizer_spec = 3; TrainerSpec trainer_spec = 2 }
//! SentencePiece   { string piece = 1; float score = 2; enum type = 3 (default NORMAL = 1) }
//! NormalizerSpec  { bytes precompiled_charsmap = 2; bool add_dummy_prefix = 3; bool remove_extra_whitespaces = 4 }
//! TrainerSpec     { enum model_type = 3 (UNIGRAM 1, BPE 2) }
//! ```

/// One vocabulary entry; `kind` uses the numbers that GGUF's token types took over.
#[derive(Debug)]
pub(crate) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: i32,
}

#[derive(Debug)]
pub(crate) struct Model {
    pub pieces: Vec<Piece>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub is_bpe: bool,
    pub has_charsmap: bool,
}

/// Protobuf wire format: each field is a varint key (number << 3 | type) and its value.
enum Field<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64,
    Bytes(&'a [u8]),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for i in 0..10 {
            let (&b, rest) = self.0.split_first().ok_or("truncated number")?;
            self.0 = rest;
            value |= u64::from(b & 0x7f) << (7 * i).min(63);
            if b & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number of more than ten bytes".into())
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        if n > self.0.len() as u64 {
            return Err(format!("a field of {n} bytes where {} are left", self.0.len()));
        }
        let (head, rest) = self.0.split_at(n as usize);
        self.0 = rest;
        Ok(head)
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(n)?)
            }
            5 => Field::Fixed32(self.take(4)?.try_into().map_err(|_| "truncated")?),
            other => return Err(format!("unknown wire type {other}")),
        };
        Ok(Some((key >> 3, field)))
    }
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Model, String> {
    let mut model =
        Model { pieces: Vec::new(), add_dummy_prefix: true, remove_extra_whitespaces: true, is_bpe: false, has_charsmap: false };
    let mut r = Reader(bytes);
    while let Some((number, field)) = r.next()? {
        match (number, field) {
            (1, Field::Bytes(b)) => model.pieces.push(piece(b)?),
            (2, Field::Bytes(b)) => trainer(b, &mut model)?,
            (3, Field::Bytes(b)) => normalizer(b, &mut model)?,
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err("it holds no pieces; it is no SentencePiece model".into());
    }
    Ok(model)
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut p = Piece { text: String::new(), score: 0.0, kind: 1 };
    let mut r = Reader(bytes);
    while let Some((number, field)) = r.next()? {
        match (number, field) {
            (1, Field::Bytes(b)) => p.text = String::from_utf8(b.to_vec()).map_err(|_| "a piece that is not UTF-8".to_owned())?,
            (2, Field::Fixed32(b)) => p.score = f32::from_le_bytes(b),
            (3, Field::Varint(v)) => {
                p.kind = i32::try_from(v).ok().filter(|k| (1..=6).contains(k)).ok_or_else(|| format!("a piece of type {v}"))?
            }
            _ => {}
        }
    }
    Ok(p)
}

fn trainer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    let mut r = Reader(bytes);
    while let Some((number, field)) = r.next()? {
        if let (3, Field::Varint(v)) = (number, field) {
            model.is_bpe = v == 2;
        }
    }
    Ok(())
}

fn normalizer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    let mut r = Reader(bytes);
    while let Some((number, field)) = r.next()? {
        match (number, field) {
            (2, Field::Bytes(b)) => model.has_charsmap = !b.is_empty(),
            (3, Field::Varint(v)) => model.add_dummy_prefix = v != 0,
            (4, Field::Varint(v)) => model.remove_extra_whitespaces = v != 0,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn hostile_bytes_are_errors_not_panics() {
        assert!(super::parse(&[]).is_err());
        assert!(super::parse(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f]).unwrap_err().contains("bytes where"));
        assert!(super::parse(&[0xff; 64]).is_err());
        for n in 0..200u8 {
            let _ = super::parse(&(0..64u8).map(|i| n.wrapping_mul(31).wrapping_add(i.wrapping_mul(7))).collect::<Vec<_>>());
        }
    }
}

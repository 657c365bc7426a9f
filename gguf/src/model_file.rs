//! A model on disk: one GGUF file or all shards of a split one, mapped.

use crate::edit;
use crate::error::{Error, Result};
use crate::header::Header;
use crate::limits;
use crate::mmap::Mapping;
use crate::tensor_info::TensorInfo;
use crate::value::Metadata;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The mapped shards and their headers. A single file is a split of one.
#[derive(Debug)]
pub struct ModelFile {
    shards: Vec<(Mapping, Header)>,
    index: HashMap<String, (usize, usize)>,
}

/// A tensor and its bytes in the map.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub info: &'a TensorInfo,
    pub bytes: &'a [u8],
}

impl ModelFile {
    /// Opens a file, or every shard of `NAME-00001-of-000NN.gguf` given its first.
    pub fn open(path: &Path) -> Result<ModelFile> {
        let first = open_shard(path)?;
        let meta = first.1.metadata();
        let count = meta.opt_u64("split.count").map_err(|e| e.in_file(path))?.unwrap_or(0).max(1);
        if count > limits::MAX_SHARDS {
            return Err(Error::BadSplit { reason: format!("split.count is {count}, the limit is {}", limits::MAX_SHARDS) }.in_file(path));
        }
        let number = meta.opt_u64("split.no").map_err(|e| e.in_file(path))?.unwrap_or(0);
        if number != 0 {
            return Err(Error::BadSplit { reason: format!("this is shard {} of {count}; open the first shard", number + 1) }.in_file(path));
        }
        let wanted = meta.opt_u64("split.tensors.count").map_err(|e| e.in_file(path))?;
        let mut shards = vec![first];
        for i in 1..count {
            let path = shard_path(path, i, count)?;
            let shard = open_shard(&path)?;
            if shard.1.metadata().opt_u64("split.no")? != Some(i) {
                return Err(Error::BadSplit { reason: format!("split.no should be {i}") }.in_file(&path));
            }
            shards.push(shard);
        }
        let mut index = HashMap::new();
        for (s, (mapping, header)) in shards.iter().enumerate() {
            for (t, info) in header.tensors().iter().enumerate() {
                if index.insert(info.name().to_owned(), (s, t)).is_some() {
                    return Err(Error::DuplicateTensor { tensor: info.name().to_owned() }.in_file(mapping.path()));
                }
            }
        }
        if count > 1 && wanted.is_some_and(|n| n != index.len() as u64) {
            return Err(Error::BadSplit {
                reason: format!("the shards hold {} tensors, split.tensors.count says {}", index.len(), wanted.unwrap_or(0)),
            }
            .in_file(path));
        }
        Ok(ModelFile { shards, index })
    }

    /// The first shard's metadata, which describes the model.
    pub fn metadata(&self) -> &Metadata {
        self.shards[0].1.metadata()
    }

    pub fn version(&self) -> u32 {
        self.shards[0].1.version()
    }

    pub fn path(&self) -> &Path {
        self.shards[0].0.path()
    }

    /// All shards.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|(m, _)| m.path())
    }

    pub fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// Bytes of all shards.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|(m, _)| m.bytes().len() as u64).sum()
    }

    /// All tensors, shard by shard, in the order of their entries.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        (0..self.shards.len()).flat_map(move |s| (0..self.shards[s].1.tensors().len()).map(move |t| self.view(s, t)))
    }

    pub fn n_tensors(&self) -> usize {
        self.index.len()
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.index.get(name).map(|&(s, t)| self.view(s, t))
    }

    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| Error::MissingTensor { tensor: name.to_owned() }.in_file(self.path()))
    }

    /// The mapping that holds `name` and the tensor's byte range within it.
    pub fn place(&self, name: &str) -> Option<(&Mapping, Range<usize>)> {
        let &(s, t) = self.index.get(name)?;
        Some((&self.shards[s].0, self.range(s, t)))
    }

    fn range(&self, s: usize, t: usize) -> Range<usize> {
        let header = &self.shards[s].1;
        let info = &header.tensors()[t];
        // Header::parse established that this lies within the file.
        let start = (header.data_start() + info.offset()) as usize;
        start..start + info.n_bytes() as usize
    }

    fn view(&self, s: usize, t: usize) -> TensorView<'_> {
        let (mapping, header) = &self.shards[s];
        TensorView { info: &header.tensors()[t], bytes: &mapping.bytes()[self.range(s, t)] }
    }

    /// All bytes of the first file.
    pub fn bytes(&self) -> &[u8] {
        self.shards[0].0.bytes()
    }

    /// As [`Mapping::in_huge_pages`].
    pub fn in_huge_pages(&self) {
        self.shards.iter().for_each(|(m, _)| m.in_huge_pages());
    }

    /// Errors if any shard became shorter since it was mapped.
    pub fn check_length(&self) -> Result<()> {
        self.shards.iter().try_for_each(|(m, _)| m.check_length())
    }
}

fn open_shard(path: &Path) -> Result<(Mapping, Header)> {
    if edit::was_interrupted(path) {
        return Err(Error::Interrupted { path: path.to_owned() });
    }
    let mapping = Mapping::open(path)?;
    let header = Header::parse(mapping.bytes(), mapping.bytes().len() as u64).map_err(|e| e.in_file(path))?;
    Ok((mapping, header))
}

/// `model-00001-of-00003.gguf` → `model-00002-of-00003.gguf` for `i` = 1.
fn shard_path(first: &Path, i: u64, count: u64) -> Result<PathBuf> {
    let name = first.file_name().and_then(|n| n.to_str()).unwrap_or("");
    let suffix = format!("-00001-of-{count:05}.gguf");
    match name.strip_suffix(&suffix) {
        Some(stem) => Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", i + 1))),
        None => Err(Error::BadSplit { reason: format!("the first of {count} shards must be named NAME{suffix}") }.in_file(first)),
    }
}

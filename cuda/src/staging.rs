//! Page-locked memory of the host, which a GPU copies from by itself, at the
//! bus's speed; from other memory the driver copies twice.

use crate::Device;
use crate::error::Result;
use std::ptr::NonNull;

/// Freed when it is dropped. What a [`Buffer`](crate::Buffer) was told to take from it may be
/// overwritten once [`Device::wait`] has returned.
pub struct Staging {
    device: Device,
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns the memory, which any thread may write, and the device may be used from any.
unsafe impl Send for Staging {}

impl Device {
    /// Zeroed. Systems limit how much memory may be locked, so a caller needs a way without.
    pub fn staging(&self, bytes: usize) -> Result<Staging> {
        let at = self.0.gpu.allocate_locked(bytes.max(1))?;
        // SAFETY: just allocated, with as many bytes.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Staging { device: self.clone(), at, bytes })
    }
}

impl AsRef<[u8]> for Staging {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: its own allocation, whose bytes were set when it was made.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }
}

impl AsMut<[u8]> for Staging {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies from it may still be on their way. An error means that the driver has gone, and they with it.
        let _ = self.device.wait();
        // SAFETY: from `allocate_locked` with as many bytes, and nobody reads it any more.
        unsafe { self.device.0.gpu.free_locked(self.at, self.bytes.max(1)) };
    }
}

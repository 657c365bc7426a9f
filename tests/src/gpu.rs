//! What can run GPU kernels here.

use cuda::Device;

/// This host, once for each order of threads (true: last to first), and a GPU where there is one; each anew,
/// so that its account of memory begins at nothing.
pub fn devices(orders: &[bool]) -> Vec<Device> {
    let mut all: Vec<Device> = Vec::with_capacity(orders.len() + 1);
    #[cfg(feature = "cuda-host")]
    all.extend(orders.iter().map(|reversed| Device::host(0, *reversed)));
    #[cfg(feature = "cuda")]
    match Device::first(0) {
        Ok(d) => all.push(d),
        Err(e) => println!("skipped: {e}"),
    }
    all.iter().for_each(|d| println!("on {}", d.name()));
    all
}

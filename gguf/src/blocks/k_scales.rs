//! The 12 bytes of scales that Q4_K and Q5_K share: eight 6-bit scales and
//! eight 6-bit mins.
//!
//! Bytes 0–3 hold scales 0–3 in their low six bits, bytes 4–7 mins 0–3; bytes
//! 8–11 hold the low nibbles of scale 4–7 (low) and min 4–7 (high), whose two
//! top bits lie in the top two bits of bytes 0–3 and 4–7.

/// (scale, min) of sub-block `j`.
#[inline(always)]
pub fn unpack(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 { (s[j] & 63, s[j + 4] & 63) } else { ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4) }
}

#[inline(always)]
pub fn pack(scales: &[u8; 8], mins: &[u8; 8], s: &mut [u8]) {
    for j in 0..4 {
        s[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        s[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6;
        s[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn packing_is_reversible() {
        let scales = [0, 63, 17, 5, 62, 33, 16, 15];
        let mins = [63, 0, 1, 48, 15, 16, 63, 32];
        let mut s = [0u8; 12];
        super::pack(&scales, &mins, &mut s);
        for j in 0..8 {
            assert_eq!(super::unpack(&s, j), (scales[j], mins[j]));
        }
    }
}

// A row's RMS norm.
#pragma once
#include "ptx.cuh"

// 1 / rms of n values, or of none where there is no row. Of the whole block; `parts`: a float a warp, in shared memory.
__device__ __forceinline__ float norm_scale(const float *x, bool real, unsigned n, float eps, float *parts) {
    float squares = 0;
    for (unsigned i = threadIdx.x; real && i < n; i += blockDim.x) squares += x[i] * x[i];
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
    __syncthreads();
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) total += parts[w];
    return 1.0f / sqrtf(total / float(n) + eps);
}

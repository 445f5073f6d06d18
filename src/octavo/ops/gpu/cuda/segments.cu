// A codebook of sixteen segments, computed instead of looked up (SEGMENTS == 1).
//
//     code[16 h + l] = (base[h] + slope[h] l) / 16384        integers; |base + slope l| <= 16384, 0 <= slope (docs/FORMAT.md)
//
// Sixteen words of shared memory, (base, slope) as two 16-bit integers each, lie in sixteen banks: lanes either meet at one word,
// which is one read, or are in different banks. A weight is then computed without a rounding until its scale is applied:
//
//     n = base + slope l                  one dot product of 16-bit by 8-bit integers (dp2a: sm_61), which adds the bits of
//                                         MAGIC = 1.5 2^23, so that its result, read as a float, is MAGIC + n
//     w = n (scale / 16384)               one multiply-add: (MAGIC + n) u - MAGIC u
//
// The second is exact but for its one rounding where MAGIC u is a float, which it is for a float16 scale (11 bits, and 2 of
// MAGIC): the same number as code * scale rounded once. For float32 scales the code comes first, exactly, and is then multiplied.
#if SEGMENTS
#define MAGIC 12582912.0f
#define MAGIC_BITS 0x4b400000u
#define GRID 16384.0f

#ifndef OCTAVO_HOST
typedef u32 table_ref;  // an address in shared memory
// The word at `offset` bytes.
__device__ __forceinline__ u32 line_at(table_ref lines, u32 offset) {
    u32 line;
    asm("ld.shared.u32 %0, [%1];" : "=r"(line) : "r"(lines + offset));
    return line;
}
#else
typedef const u32* table_ref;
__device__ __forceinline__ u32 line_at(table_ref lines, u32 offset) { return lines[offset / 4]; }
#endif

#define DECLARE_TABLE __shared__ __align__(16) u32 table[16]

// Finds the lines in the codebook (every thread of the block must call it).
__device__ __forceinline__ table_ref fill_table(u32* table, const float* code) {
    if (threadIdx.x < 16) {
        const int base = (int)(code[16 * threadIdx.x] * GRID);
        const int slope = (int)(code[16 * threadIdx.x + 1] * GRID) - base;
        table[threadIdx.x] = (u32)base << 16 | (u32)slope;
    }
    __syncthreads();
    return settled(table);
}

// For the four bytes of q, lowest byte first: MAGIC + n.
__device__ __forceinline__ void look_up(u32 q, table_ref lines, float w[4]) {
    const u32 offsets = q >> 2 & 0x3c3c3c3cu, low = q & 0x0f0f0f0fu;
    // Two offsets on a line each, with a factor of 1 for its base.
    const u32 first = permute<0x4140>(low, 1), second = permute<0x4342>(low, 1);
    w[0] = bits_to_float(dot_2<0>(line_at(lines, byte_of<0>(offsets)), first, MAGIC_BITS));
    w[1] = bits_to_float(dot_2<1>(line_at(lines, byte_of<1>(offsets)), first, MAGIC_BITS));
    w[2] = bits_to_float(dot_2<0>(line_at(lines, byte_of<2>(offsets)), second, MAGIC_BITS));
    w[3] = bits_to_float(dot_2<1>(line_at(lines, byte_of<3>(offsets)), second, MAGIC_BITS));
}

// A block's scale in the form that `weight` takes, and the weight for MAGIC + n.
#if SCALE == 1
struct scale_form {
    float unit, offset;
};
__device__ __forceinline__ scale_form formed(float scale) {
    const scale_form made = {scale / GRID, scale * (-MAGIC / GRID)};
    return made;
}
__device__ __forceinline__ float weight(float n, scale_form scale) { return fmaf(n, scale.unit, scale.offset); }
#else
typedef float scale_form;
__device__ __forceinline__ scale_form formed(float scale) { return scale; }
__device__ __forceinline__ float weight(float n, scale_form scale) {
    return multiply(fmaf(n, 1.0f / GRID, -MAGIC / GRID), scale);
}
#endif
#endif

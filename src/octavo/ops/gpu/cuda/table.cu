// The look-up in a table of 256 entries, for any codebook (SEGMENTS == 0).
//
// Shared memory has 32 banks of 4 bytes. With 32 copies, entry i of copy c lies at word 32 i + c, which is bank c
// whatever i is; lane l reads copy l, so the lanes of a warp never meet. A lane's address is then its own base plus
// 128 i: one instruction takes the byte out of its word, one multiplies and adds.

#if !SEGMENTS
#ifndef COPIES
#define COPIES 32
#endif

#ifndef OCTAVO_HOST
typedef u32 table_ref;  // an address in shared memory
__device__ __forceinline__ float entry(table_ref mine, u32 i) {
    float f;
    asm("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(mine + i * (4 * COPIES)));
    return f;
}
#else
typedef const float* table_ref;
__device__ __forceinline__ float entry(table_ref mine, u32 i) { return mine[i * COPIES]; }
#endif

#define DECLARE_TABLE __shared__ __align__(16) float table[256 * COPIES]

// Fills the table (every thread of the block must call it) and returns this lane's copy.
__device__ __forceinline__ table_ref fill_table(float* table, const float* code) {
    // A thread copies one entry. It starts with its lane's copy: so a warp's stores go to different banks.
    const int i = threadIdx.x % 256;
    const float value = code[i];
#pragma unroll
    for (int c = 0; c < COPIES; c++) table[i * COPIES + (c + threadIdx.x) % COPIES] = value;
    __syncthreads();
    return settled(table + threadIdx.x % COPIES);
}

// The four code entries that the bytes of q index, lowest byte first, from this lane's copy of the table.
__device__ __forceinline__ void look_up(u32 q, table_ref mine, float w[4]) {
    w[0] = entry(mine, byte_of<0>(q));
    w[1] = entry(mine, byte_of<1>(q));
    w[2] = entry(mine, byte_of<2>(q));
    w[3] = entry(mine, byte_of<3>(q));
}

// A block's scale in the form that `weight` takes, and the weight for an entry.
typedef float scale_form;
__device__ __forceinline__ scale_form formed(float scale) { return scale; }
__device__ __forceinline__ float weight(float entry, scale_form scale) { return multiply(entry, scale); }
#endif

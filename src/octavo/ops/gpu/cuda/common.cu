// CUDA kernels for what Triton cannot express: a look-up table with one copy per shared-memory bank.
//
// Compiled at run time, without any header: this file, then stream.cu, then the kernel's own. Every kernel reads a
// quantized matrix
//
//     qdata uint8 [rows, columns], absmax [rows, ceil(columns / block)], code float32 [256]
//     weight[n, k] = code[qdata[n, k]] * absmax[n, k / block]         (float32, one rounding)
//
// and asks for: columns a multiple of 16, a 16-byte aligned qdata and input, a block that is a power of two >= 16.
// Results depend on no atomic and no launch size: the same input gives the same bits.
//
// Parameters, given with -D:
//     X_TYPE   0 float32, 1 float16, 2 bfloat16: type of the input and the output
//     SCALE    0 float32, 1 float16: type of absmax
//     COPIES   of the table in shared memory: 1, 2, ... 32 (the default, free of bank conflicts)
//     TOKENS, ROWS       linear_simt: tokens at most, rows a warp
//     M_TILES, N_TILES, WARPS_M   linear_mma: 16-row tiles a warp, 8-token tiles, groups of warps
//     DEPTH              steps whose loads are in flight

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#ifndef COPIES
#define COPIES 32
#endif
#ifndef WARPS
#define WARPS 8
#endif
// At least as many as the table has entries.
#define THREADS (WARPS * 32)

// ---- numbers -------------------------------------------------------------------------------------------------

#ifndef OCTAVO_HOST
__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ float bits_to_float(u32 u) { return __uint_as_float(u); }
__device__ __forceinline__ u32 float_to_bits(float f) { return __float_as_uint(f); }
// A product that the compiler may not fuse into an addition: the weight has one rounding, as in the reference.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
// Byte B of q. In assembly, because the compiler would turn the byte's extraction and its use as an index into three
// shifts, masks and additions; as it is, they are one byte permutation and one shifted addition.
template <int B>
__device__ __forceinline__ u32 byte_of(u32 q) {
    u32 d;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(q), "n"(0x4440 + B));
    return d;
}
// Weights are read once: where that can be said (sm_70) they bypass L1, which then keeps the input.
#if __CUDA_ARCH__ >= 700
#define LOAD "ld.global.nc.L1::no_allocate"
#else
#define LOAD "ld.global.nc"
#endif
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile(LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 load_once(const uint2* p) {
    uint2 v;
    asm volatile(LOAD ".v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
#endif

// By hand: the hardware's own conversion needs sm_80.
__device__ __forceinline__ u16 float_to_bfloat(float f) {
    u32 u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u16)((u >> 16) | 0x40u);
    return (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#if X_TYPE == 0
typedef float scalar;
__device__ __forceinline__ scalar narrow(float f) { return f; }
__device__ __forceinline__ float widen(scalar s) { return s; }
#elif X_TYPE == 1
typedef u16 scalar;
__device__ __forceinline__ scalar narrow(float f) { return float_to_half(f); }
__device__ __forceinline__ float widen(scalar s) { return half_to_float(s); }
#else
typedef u16 scalar;
__device__ __forceinline__ scalar narrow(float f) { return float_to_bfloat(f); }
__device__ __forceinline__ float widen(scalar s) { return bits_to_float((u32)s << 16); }
#endif

// Two weights, rounded to nearest and packed: the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
#if X_TYPE == 0
    return 0;  // not used with float32
#elif !defined(OCTAVO_HOST) && __CUDA_ARCH__ >= 800
    u32 d;
#if X_TYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
    return d;
#else
    return (u32)narrow(low) | ((u32)narrow(high) << 16);
#endif
}

#if SCALE == 1
typedef u16 scale_type;
__device__ __forceinline__ float scale_value(scale_type s) { return half_to_float(s); }
#else
typedef float scale_type;
__device__ __forceinline__ float scale_value(scale_type s) { return s; }
#endif

// Four values of x from p, which is aligned to them.
__device__ __forceinline__ void load_x(const scalar* p, float x[4]) {
#if X_TYPE == 0
    uint4 v = *(const uint4*)p;
    x[0] = bits_to_float(v.x);
    x[1] = bits_to_float(v.y);
    x[2] = bits_to_float(v.z);
    x[3] = bits_to_float(v.w);
#else
    uint2 v = *(const uint2*)p;
    x[0] = widen((scalar)(v.x & 0xffffu));
    x[1] = widen((scalar)(v.x >> 16));
    x[2] = widen((scalar)(v.y & 0xffffu));
    x[3] = widen((scalar)(v.y >> 16));
#endif
}

// ---- the look-up ---------------------------------------------------------------------------------------------
//
// Shared memory has 32 banks of 4 bytes. With 32 copies, entry i of copy c lies at word 32 i + c, which is bank c
// whatever i is; lane l reads copy l, so the lanes of a warp never meet. A lane's address is then its own base plus
// 128 i: one instruction takes the byte out of its word, one multiplies and adds.

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
    const float* mine = table + threadIdx.x % COPIES;
#ifdef OCTAVO_HOST
    return mine;
#else
    // Made here, behind the barrier, and opaque: no look-up can move in front of it, and the compiler does not take
    // the address apart again.
    u32 address = (u32)__cvta_generic_to_shared(mine), made;
    asm volatile("mov.u32 %0, %1;" : "=r"(made) : "r"(address) : "memory");
    return made;
#endif
}

// The four code entries that the bytes of q index, lowest byte first, from this lane's copy of the table.
__device__ __forceinline__ void look_up(u32 q, table_ref mine, float w[4]) {
    w[0] = entry(mine, byte_of<0>(q));
    w[1] = entry(mine, byte_of<1>(q));
    w[2] = entry(mine, byte_of<2>(q));
    w[3] = entry(mine, byte_of<3>(q));
}

// The four weights of q, rounded to the input's 16-bit type, in two packed pairs.
__device__ __forceinline__ void decode_4(u32 q, float scale, table_ref mine, u32& first, u32& second) {
    float w[4];
    look_up(q, mine, w);
    first = pack(multiply(w[0], scale), multiply(w[1], scale));
    second = pack(multiply(w[2], scale), multiply(w[3], scale));
}

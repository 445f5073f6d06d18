// CUDA kernels for what Triton cannot express: a look-up table with one copy per shared-memory bank, or a codebook of
// segments computed in integers.
//
// Compiled at run time, without any header: this file, then table.cu or segments.cu (which one, SEGMENTS says), stream.cu, and
// the kernel's own. Every kernel reads a quantized matrix
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
//     SEGMENTS 1: the codebook is sixteen segments (docs/FORMAT.md); 0, the default: any table
//     COPIES   of the table in shared memory: 1, 2, ... 32 (the default, free of bank conflicts)
//     TOKENS, ROWS       linear_simt: tokens at most, rows a warp
//     M_TILES, N_TILES, WARPS_M   linear_mma: 16-row tiles a warp, 8-token tiles, groups of warps
//     DEPTH              steps whose loads are in flight

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#ifndef SEGMENTS
#define SEGMENTS 0
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
// An address in shared memory, made behind the barrier before it and opaque: no look-up can move in front of it, and the compiler
// does not take the address apart again.
__device__ __forceinline__ u32 settled(const void* shared) {
    u32 address = (u32)__cvta_generic_to_shared(shared), made;
    asm volatile("mov.u32 %0, %1;" : "=r"(made) : "r"(address) : "memory");
    return made;
}
// Byte B of q. In assembly, because the compiler would turn the byte's extraction and its use as an index into three
// shifts, masks and additions; as it is, they are one byte permutation and one shifted addition.
template <int B>
__device__ __forceinline__ u32 byte_of(u32 q) {
    u32 d;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(q), "n"(0x4440 + B));
    return d;
}
// Bytes of a (numbers 0 to 3) and b (4 to 7), by the four digits of SELECTOR, the last one for the lowest byte.
template <int SELECTOR>
__device__ __forceinline__ u32 permute(u32 a, u32 b) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(SELECTOR));
    return d;
}
// The two signed 16-bit halves of a times two unsigned bytes of b, the lower two or (HALF) the upper, added to c.
template <int HALF>
__device__ __forceinline__ u32 dot_2(u32 a, u32 b, u32 c) {
#if __CUDA_ARCH__ >= 610
    u32 d;
    if (HALF) {
        asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
#else
    const u32 bytes = b >> (16 * HALF);
    return (short)a * (int)(bytes & 0xffu) + ((int)a >> 16) * (int)(bytes >> 8 & 0xffu) + c;
#endif
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

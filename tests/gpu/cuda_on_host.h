// Runs a CUDA kernel on the CPU, thread by thread, so that its indexing can be tested without a GPU.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it meets the others at a
// barrier, a shuffle or a matrix instruction, and then lets the next one run. Only what kernels.cu uses is here. What
// it cannot show: races within a warp, timing, and the compiler's choices for a real GPU.
#pragma once
#define OCTAVO_HOST
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct Dim {
    int x;
};
static Dim threadIdx, blockIdx, gridDim;
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline float __ldg(const float* p) { return *p; }

// ---- fibers ----
static const int BLOCK_THREADS = 256, STACK = 1 << 16;
static ucontext_t scheduler, fibers[BLOCK_THREADS];
static bool done[BLOCK_THREADS];
static int running, arrived[9], generation[9];  // 8 warps, and the block
static std::function<void()> body;

static void wait_for(int group, int members) {
    int mine = generation[group];
    if (++arrived[group] == members) {
        arrived[group] = 0;
        generation[group]++;
        return;
    }
    while (generation[group] == mine) swapcontext(&fibers[running], &scheduler);
}
static void __syncthreads() { wait_for(8, BLOCK_THREADS); }
static void __syncwarp() { wait_for(running / 32, 32); }

static void enter() {
    body();
    done[running] = true;
}

// Shared memory starts as garbage, as on the device.
static void launch(int grid, std::function<void()> kernel) {
    static std::vector<char> stacks((size_t)BLOCK_THREADS * STACK);
    body = kernel;
    gridDim.x = grid;
    for (int block = 0; block < grid; block++) {
        blockIdx.x = block;
        memset(arrived, 0, sizeof arrived);
        for (int i = 0; i < BLOCK_THREADS; i++) {
            done[i] = false;
            getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = &stacks[(size_t)i * STACK];
            fibers[i].uc_stack.ss_size = STACK;
            fibers[i].uc_link = &scheduler;
            makecontext(&fibers[i], enter, 0);
        }
        for (int left = BLOCK_THREADS, idle = 0; left > 0;) {
            for (int i = 0; i < BLOCK_THREADS; i++) {
                if (done[i]) continue;
                running = threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i]);
                if (done[i]) left--, idle = 0;
            }
            if (++idle > 1 << 20) abort();  // threads that wait for each other for ever
        }
    }
}

// ---- what a warp does together ----
static float shuffled[BLOCK_THREADS];
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    int me = running;
    shuffled[me] = value;
    __syncwarp();
    float other = shuffled[me ^ mask];
    __syncwarp();
    return other;
}

// ---- numbers ----
static inline float bits_to_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline unsigned float_to_bits(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float half_to_float(unsigned short h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
}
static inline unsigned short float_to_half(float f) {
    _Float16 x = (_Float16)f;
    unsigned short h;
    memcpy(&h, &x, 2);
    return h;
}
static inline float multiply(float a, float b) { return a * b; }
template <int B>
static inline unsigned byte_of(unsigned q) {
    return (q >> (8 * B)) & 0xffu;
}
template <class T>
static inline const T* settled(const T* shared) {
    return shared;
}
// PTX prmt.b32 in its default mode, for selectors without the sign's digit; dp2a.{lo, hi}.s32.u32.
template <int SELECTOR>
static inline unsigned permute(unsigned a, unsigned b) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= (unsigned)(bytes >> 8 * (SELECTOR >> 4 * i & 7) & 0xff) << 8 * i;
    return d;
}
template <int HALF>
static inline unsigned dot_2(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 2; i++) c += (int)(short)(a >> 16 * i) * (int)(b >> 8 * (2 * HALF + i) & 0xff);
    return c;
}
template <class T>
static inline T load_once(const T* p) {
    if ((size_t)p % sizeof(T)) abort();  // a misaligned load is an error on the device
    return *p;
}

#ifdef M_TILES
// mma.m16n8k16, by the PTX manual's layout: lane (g, t) = (lane / 4, lane % 4) holds of A the pairs
// (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8); of B (k 2t, column g), (k 2t + 8, column g);
// of C (row g, columns 2t, 2t + 1), (row g + 8, the same).
static unsigned held_a[BLOCK_THREADS][4], held_b[BLOCK_THREADS][2];
static inline float element(unsigned pair, int which) {
    unsigned short h = which ? pair >> 16 : pair & 0xffff;
#if X_TYPE == 1
    return half_to_float(h);
#else
    return bits_to_float((unsigned)h << 16);
#endif
}
#ifndef HALF_STEPS
static inline void mma(float c[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    int me = running, warp = me / 32 * 32, g = me % 32 / 4, t = me % 4;
    unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    memcpy(held_a[me], a, sizeof a);
    memcpy(held_b[me], b, sizeof b);
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        int row_half = e / 2, column = 2 * t + e % 2;
        for (int k = 0; k < 16; k++) {
            int k_half = k / 8, owner = k % 8 / 2;
            c[e] += element(held_a[warp + g * 4 + owner][row_half + 2 * k_half], k % 2) *
                    element(held_b[warp + column * 4 + owner][k_half], k % 2);
        }
    }
    __syncwarp();
}
#else
// mma.m16n8k8: of A (row g, k 2t), (row g + 8, k 2t), of B (k 2t, column g), of C as above.
static inline void mma_8(float c[4], unsigned a0, unsigned a1, unsigned b) {
    int me = running, warp = me / 32 * 32, g = me % 32 / 4, t = me % 4;
    held_a[me][0] = a0, held_a[me][1] = a1, held_b[me][0] = b;
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        for (int k = 0; k < 8; k++) {
            c[e] += element(held_a[warp + g * 4 + k / 2][e / 2], k % 2) *
                    element(held_b[warp + (2 * t + e % 2) * 4 + k / 2][0], k % 2);
        }
    }
    __syncwarp();
}
#endif
#endif

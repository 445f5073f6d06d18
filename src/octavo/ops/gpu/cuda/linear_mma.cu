// Linear, 1 to 64 tokens, on tensor cores, with mma.m16n8k16 (sm_80 and later; float16 and bfloat16) or with two mma.m16n8k8 in its
// place (sm_75; float16).
//
// A block computes HEIGHT = 16 * M_TILES * WARPS_M rows for 8 * N_TILES tokens. Its 8 warps are WARPS_M groups, each with
// rows of its own; the WARPS_K warps of a group share out the columns, 64 at a time. A product does not care in which
// order it sums, so the columns are dealt to the instruction's k as the loads like them: lane (g, t) (g = lane / 4,
// t = lane % 4) loads the 16 bytes of columns 16 t ... 16 t + 15 of rows g and g + 8, and of x for token g, and feeds 4 of
// these columns to each of 4 instructions. So a weight takes a look-up, a product with its scale and half a packing, for 1
// token as for 8, and is rounded exactly as the reference rounds it.
//
// The input comes through the L1 cache, where groups meet that read the same columns: more tokens want more rows a block.
// At the end of a tile the sums of a group's warps are added, always in the warps' order.

#ifndef OCTAVO_HOST
#if __CUDA_ARCH__ < 800
#define HALF_STEPS
__device__ __forceinline__ void mma_8(float c[4], u32 a0, u32 a1, u32 b) {
#if __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}
#else
__device__ __forceinline__ void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32."
#if X_TYPE == 1
        "f16.f16"
#else
        "bf16.bf16"
#endif
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif
#endif
#ifdef HALF_STEPS
// The first two operands of the larger instruction are its first eight columns, laid out as the smaller has them; so are the others.
__device__ __forceinline__ void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    mma_8(c, a0, a1, b0);
    mma_8(c, a2, a3, b1);
}
#endif

#ifndef WARPS_M
#define WARPS_M 1
#endif
#define WARPS_K (WARPS / WARPS_M)
#define FRAGMENTS (M_TILES * N_TILES)
// Fragments whose sums are exchanged at once: with the table, that stays within 48 KB of shared memory.
#define EXCHANGED (FRAGMENTS < 4 ? FRAGMENTS : 4)
#define LINES (2 * M_TILES)
#define WIDTH (64 * WARPS_K)
#define HEIGHT (16 * M_TILES * WARPS_M)
// Blocks that must fit a multiprocessor at once, which bounds the registers (one more, or fewer, is within 3 %, or spills and is slower).
#ifndef RESIDENT
#define RESIDENT (FRAGMENTS < 2 ? 3 : FRAGMENTS < 8 ? 2 : 1)
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
linear_mma(const scalar* __restrict__ x, const u8* __restrict__ qdata, const scale_type* __restrict__ absmax,
           const float* __restrict__ code, const scalar* __restrict__ bias, scalar* __restrict__ out,
           int tokens, int rows, int columns, int block_log2, int blocks) {
    DECLARE_TABLE;
    __shared__ float sums[WARPS][EXCHANGED][4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const int group = warp / WARPS_K;
    const int tiles = (rows + HEIGHT - 1) / HEIGHT;
    const int end = (columns + WIDTH * DEPTH - 1) / (WIDTH * DEPTH) * (WIDTH * DEPTH);
    const int first_column = warp % WARPS_K * 64 + t * 16;
    int tile = blockIdx.x;
    Stream<LINES> stream = {qdata, absmax, rows, columns, block_log2, blocks, tile, (int)gridDim.x, tiles,
                            first_column, end, first_column, WIDTH, HEIGHT, group * 16 * M_TILES + g, 8};
    Step<LINES> held[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) stream.load(held[d]);
    const table_ref mine = fill_table(table, code);

    for (; tile < tiles; tile += gridDim.x) {
        float sum[FRAGMENTS][4];
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[f][e] = 0.0f;
        for (int c = first_column; c < end;) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++, c += WIDTH) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint4 xs[N_TILES];
#pragma unroll
                    for (int n = 0; n < N_TILES; n++) {
                        int token = n * 8 + g;
                        xs[n] = make_uint4(0, 0, 0, 0);
                        if (token < tokens && c < columns) {
                            xs[n] = ((const uint4*)(x + (i64)token * columns + c))[half];
                        }
                    }
#pragma unroll
                    for (int m = 0; m < M_TILES; m++) {
                        const scale_form upper = formed(scale_value(held[d].scale[2 * m]));
                        const scale_form lower = formed(scale_value(held[d].scale[2 * m + 1]));
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            u32 a0, a1, a2, a3;
                            decode_4(word(held[d].q[2 * m], 2 * half + j), upper, mine, a0, a2);
                            decode_4(word(held[d].q[2 * m + 1], 2 * half + j), lower, mine, a1, a3);
#pragma unroll
                            for (int n = 0; n < N_TILES; n++) {
                                u32 b0 = j ? xs[n].z : xs[n].x, b1 = j ? xs[n].w : xs[n].y;
                                mma(sum[m * N_TILES + n], a0, a1, a2, a3, b0, b1);
                            }
                        }
                    }
                }
                stream.load(held[d]);
            }
        }

        // Add the sums of each group's warps, always in the same order.
#pragma unroll
        for (int base = 0; base < FRAGMENTS; base += EXCHANGED) {
#pragma unroll
            for (int f = 0; f < EXCHANGED; f++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[warp][f][e][lane] = sum[base + f][e];
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < WARPS_M * EXCHANGED * 128; i += THREADS) {
                // Neighbouring threads take neighbouring rows of one token: their stores join.
                int from = i / (EXCHANGED * 128), f = i / 128 % EXCHANGED, token = i % 128 / 16, r = i % 16;
                int owner = (r % 8) * 4 + token / 2, e = (r / 8) * 2 + token % 2;
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS_K; w++) total += sums[from * WARPS_K + w][f][e][owner];
                int n = tile * HEIGHT + (from * M_TILES + (base + f) / N_TILES) * 16 + r;
                token += (base + f) % N_TILES * 8;
                if (n < rows && token < tokens) {
                    if (bias) total += widen(bias[n]);
                    out[(i64)token * rows + n] = narrow(total);
                }
            }
            __syncthreads();
        }
    }
}

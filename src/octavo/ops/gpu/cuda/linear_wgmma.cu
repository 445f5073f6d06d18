// Linear, 9 to some hundred tokens, on Hopper's tensor cores (sm_90a; float16 and bfloat16), with wgmma.
//
// A block computes 128 rows for TOKENS tokens over a share of the columns: grid = token tiles x row tiles x splits, in that
// order. Two warpgroups take 64 rows each; with GROUPS == 2, two such teams take turns with the columns, so that one decodes
// while the other multiplies. wgmma wants its first operand, 64 rows x 16 columns, in registers laid out as mma.m16n8k16 has
// it, four warps with 16 rows each: so decoding is that of linear_mma.cu. The second operand, the input, comes from shared
// memory, where the tensor cores read it without passing registers.
//
// The decoded columns are dealt to the instructions as the loads like them: of 64 columns, lane t of a quad holds columns
// 16 t ... 16 t + 15 and feeds 4 of them to each of 4 instructions. The input must be in the same order: `permute_x` puts it
// there once, pads it with zeros to whole tiles, and the tiles are copied asynchronously, STAGES - 1 steps ahead, swizzled
// as the tensor cores expect (128-byte rows, 16-byte chunks exchanged by the row's number).
//
// A single team decodes one step of 64 columns while the tensor cores work on the one before. With more than one split, sums go to
// `parts` in float32, and `add_parts` adds them in the splits' order: the same bits every time.

#ifndef STAGES
#define STAGES 4
#endif
#define TILE_ROWS 128
#define STEP_COLUMNS 64
#define STAGE_BYTES (TOKENS * 128)
#define SUMS (TOKENS / 2)
#ifndef GROUPS
#define GROUPS 1
#endif
#define TEAM 256
#if THREADS != TEAM * GROUPS
#error "WARPS: 8 for each group"
#endif
// Sets of registers for decoded steps. A single team decodes into one while the tensor cores read the other.
#define SETS (GROUPS == 1 ? 2 : 1)
#if GROUPS == 1 && DEPTH % 2
#error "DEPTH: even, since decoded steps take turns in two sets of registers"
#endif

// Column pair (4 bytes) `to` of a permuted 64 comes from this one: instruction j, half h, lane t.
__device__ __forceinline__ int source_pair(int to) {
    int j = to / 8, h = to / 4 % 2, t = to % 4;
    return 8 * t + 2 * j + h;
}

// x [tokens, columns] -> [padded tokens, padded columns], a warp for each 64 columns of a token.
extern "C" __global__ void __launch_bounds__(THREADS)
permute_x(const scalar* __restrict__ x, scalar* __restrict__ out, int tokens, int columns, int padded_tokens, int steps) {
    const int lane = threadIdx.x % 32;
    i64 chunk = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (chunk >= (i64)padded_tokens * steps) return;
    int token = (int)(chunk / steps), column = (int)(chunk % steps) * STEP_COLUMNS + 2 * source_pair(lane);
    u32 pair = 0;
    // Columns are a multiple of 16: a pair is inside or outside as a whole.
    if (token < tokens && column < columns) pair = *(const u32*)(x + (i64)token * columns + column);
    ((u32*)out)[chunk * 32 + lane] = pair;
}

// out [tokens, rows] = the sum of parts [splits, tokens, rows], in order, + bias.
extern "C" __global__ void __launch_bounds__(THREADS)
add_parts(const float* __restrict__ parts, const scalar* __restrict__ bias, scalar* __restrict__ out, int splits,
          int tokens, int rows) {
    i64 count = (i64)tokens * rows;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
        float total = 0.0f;
        for (int s = 0; s < splits; s++) total += parts[s * count + i];
        if (bias) total += widen(bias[i % rows]);
        out[i] = narrow(total);
    }
}

#ifndef OCTAVO_HOST
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    // What threads wrote becomes visible to the tensor cores' own way into shared memory.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void team_barrier(int team) {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Values that the compiler must have made before this point, or may only use after it: wgmma runs beside what it sees.
template <int N>
__device__ __forceinline__ void settle(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}
__device__ __forceinline__ void settle(u32 (&a)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3])::"memory");
}

// Rows of 128 bytes, groups of 8 rows 1024 bytes apart, 128-byte swizzle.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | ((u64)1 << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}

// One step's 64 columns of this lane's two rows, for four instructions.
__device__ __forceinline__ void decode_step(const Step<2>& held, table_ref mine, u32 a[4][4]) {
    const scale_form upper = formed(scale_value(held.scale[0])), lower = formed(scale_value(held.scale[1]));
#pragma unroll
    for (int j = 0; j < 4; j++) {
        decode_4(word(held.q[0], j), upper, mine, a[j][0], a[j][2]);
        decode_4(word(held.q[1], j), lower, mine, a[j][1], a[j][3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_wgmma(const scalar* __restrict__ x, const u8* __restrict__ qdata, const scale_type* __restrict__ absmax,
             const float* __restrict__ code, const scalar* __restrict__ bias, scalar* __restrict__ out,
             float* __restrict__ parts, int tokens, int rows, int columns, int block_log2, int blocks, int splits) {
    DECLARE_TABLE;
    extern __shared__ u8 dynamic[];
    const int team = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
    const u32 ring = (((u32)__cvta_generic_to_shared(dynamic) + 1023) & ~1023u) + team * (STAGES * STAGE_BYTES);
    const int warp = member / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const int steps = (columns + STEP_COLUMNS - 1) / STEP_COLUMNS;
    const int row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, token_tiles = (tokens + TOKENS - 1) / TOKENS;
    const int token_tile = blockIdx.x % token_tiles, tile = blockIdx.x / token_tiles % row_tiles;
    const int split = blockIdx.x / token_tiles / row_tiles;
    const int each = (steps + splits - 1) / splits;
    // This team's steps: first, first + GROUPS, ... below last. Padded to whole rounds: a padded step reads the last tile of x and
    // weights with a scale of 0.
    const int first = split * each + team, last = min(steps, split * each + each);
    const int mine_alone = (max(last - first, 0) + GROUPS - 1) / GROUPS;
    const int count = (mine_alone + DEPTH - 1) / DEPTH * DEPTH;

    // This thread's share of a tile of x: rows of 8 chunks.
    const int chunk = member % 8, token_row = member / 8;
    const scalar* x_from = x + ((i64)token_tile * TOKENS + token_row) * steps * STEP_COLUMNS + chunk * 8;
    const u32 x_to = ring + token_row * 128 + ((chunk ^ (token_row & 7)) << 4);
    auto copy = [&](int i) {
        if (i < count) {
            const scalar* from = x_from + (i64)min(first + i * GROUPS, steps - 1) * STEP_COLUMNS;
            u32 to = x_to + i % STAGES * STAGE_BYTES;
#pragma unroll
            for (int r = 0; r < TOKENS; r += TEAM / 8) {
                copy_async(to + r * 128, from + (i64)r * steps * STEP_COLUMNS);
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy(i);

    // This lane's two rows; past the end they read the last row, of which nothing is stored.
    const int row = tile * TILE_ROWS + warp * 16 + g;
    const int upper_row = min(row, rows - 1), lower_row = min(row + 8, rows - 1);
    const u8* q_upper = qdata + (i64)upper_row * columns;
    const u8* q_lower = qdata + (i64)lower_row * columns;
    const scale_type* s_upper = absmax + (i64)upper_row * blocks;
    const scale_type* s_lower = absmax + (i64)lower_row * blocks;
    Step<2> held[DEPTH];
    auto load = [&](Step<2>& step, int i) {
        int step_number = first + i * GROUPS, column = step_number * STEP_COLUMNS + t * 16;
        if (step_number < last && column < columns) {
            step.q[0] = load_once((const uint4*)(q_upper + column));
            step.q[1] = load_once((const uint4*)(q_lower + column));
            step.scale[0] = s_upper[column >> block_log2];
            step.scale[1] = s_lower[column >> block_log2];
        } else {
            step.q[0] = step.q[1] = make_uint4(0, 0, 0, 0);
            step.scale[0] = step.scale[1] = 0;
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load(held[d], d);
    const table_ref mine = fill_table(table, code);

    float sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0.0f;
    u32 a[SETS][4][4];
    for (int base = 0; base < count; base += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int i = base + d;
            if (SETS == 1) wgmma_wait();
            decode_step(held[d], mine, a[d % SETS]);
            load(held[d], i + DEPTH);
            settle(a[d % SETS]);
            if (SETS == 2) wgmma_wait();
            await_copies<STAGES - 2>();
            team_barrier(team);
            const u64 tile_of_x = descriptor(ring + i % STAGES * STAGE_BYTES);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 4; j++) wgmma(sum, a[d % SETS][j], tile_of_x + 2 * j);
            wgmma_commit();
            copy(i + STAGES - 1);
        }
    }
    wgmma_wait();
    settle(sum);
#if GROUPS == 2
    // The first team's sums, then the second's, through the memory of the ring.
    float* exchanged = (float*)dynamic + member;
    __syncthreads();
    if (team == 1) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) exchanged[i * TEAM] = sum[i];
    }
    __syncthreads();
    if (team == 1) return;
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] += exchanged[i * TEAM];
#endif

    parts += (i64)split * tokens * rows;
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        int token = token_tile * TOKENS + i / 4 * 8 + t * 2 + i % 2, n = row + i % 4 / 2 * 8;
        if (token < tokens && n < rows) {
            if (splits > 1) {
                parts[(i64)token * rows + n] = sum[i];
            } else {
                out[(i64)token * rows + n] = narrow(bias ? sum[i] + widen(bias[n]) : sum[i]);
            }
        }
    }
}
#endif

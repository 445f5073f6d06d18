// Linear, 1 to 8 tokens, ordinary arithmetic: any input type, any GPU.
//
// A warp computes ROWS rows for all tokens. Lane l takes columns 16 l ... 16 l + 15 of each 512: one 16-byte load a
// row, all in one block of scales.

extern "C" __global__ void __launch_bounds__(THREADS)
linear_simt(const scalar* __restrict__ x, const u8* __restrict__ qdata, const scale_type* __restrict__ absmax,
            const float* __restrict__ code, const scalar* __restrict__ bias, scalar* __restrict__ out,
            int tokens, int rows, int columns, int block_log2, int blocks) {
    DECLARE_TABLE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = (rows + ROWS - 1) / ROWS, jump = gridDim.x * WARPS;
    const int groups = (columns + 512 * DEPTH - 1) / (512 * DEPTH);
    int tile = blockIdx.x * WARPS + warp;
    Stream<ROWS> stream = {qdata, absmax, rows, columns, block_log2, blocks, tile, jump, tiles, lane * 16,
                           groups * DEPTH * 512, lane * 16, 512, ROWS, 0, 1};
    Step<ROWS> held[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) stream.load(held[d]);
    const table_ref mine = fill_table(table, code);

    for (; tile < tiles; tile += jump) {
        float sum[TOKENS][ROWS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[t][r] = 0.0f;
        for (int c = lane * 16; c < groups * DEPTH * 512;) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++, c += 512) {
                scale_form scale[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++) scale[r] = formed(scale_value(held[d].scale[r]));
                if (c < columns) {
                    const scalar* from = x + c;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float xs[TOKENS][4];
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) {
                            // Tokens past the end repeat the last one, so that the loop has no branch.
                            load_x(from + (i64)min(t, tokens - 1) * columns + 4 * j, xs[t]);
                        }
#pragma unroll
                        for (int r = 0; r < ROWS; r++) {
                            float w[4];
                            look_up(word(held[d].q[r], j), mine, w);
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                const float one = weight(w[i], scale[r]);
#pragma unroll
                                for (int t = 0; t < TOKENS; t++) sum[t][r] += one * xs[t][i];
                            }
                        }
                    }
                }
                stream.load(held[d]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float total = sum[t][r];
#pragma unroll
                for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
                int n = tile * ROWS + r;
                if (lane == (t * ROWS + r) % 32 && t < tokens && n < rows) {
                    if (bias) total += widen(bias[n]);
                    out[(i64)t * rows + n] = narrow(total);
                }
            }
        }
    }
}

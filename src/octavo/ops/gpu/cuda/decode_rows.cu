// Rows of the matrix in floating point: dequantize (a range of rows and columns) and embedding.
//
// A warp a row; a lane takes 8 columns of each 256, so that 16-bit results leave in whole 16-byte stores.

__device__ __forceinline__ void store_8(uint2 q, float scale, table_ref mine, scalar* to) {
    float w[8];
    const scale_form form = formed(scale);
    look_up(q.x, mine, w);
    look_up(q.y, mine, w + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = weight(w[i], form);
#if X_TYPE == 0
    ((uint4*)to)[0] = make_uint4(float_to_bits(w[0]), float_to_bits(w[1]), float_to_bits(w[2]), float_to_bits(w[3]));
    ((uint4*)to)[1] = make_uint4(float_to_bits(w[4]), float_to_bits(w[5]), float_to_bits(w[6]), float_to_bits(w[7]));
#else
    *(uint4*)to = make_uint4(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
decode_rows(const u8* __restrict__ qdata, const scale_type* __restrict__ absmax, const float* __restrict__ code,
            const void* __restrict__ ids, scalar* __restrict__ out, int wide_ids, int count, int rows, int columns,
            int first_column, int width, int block_log2, int blocks) {
    DECLARE_TABLE;
    const table_ref mine = fill_table(table, code);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float nan = bits_to_float(0x7fc00000u);
    for (int r = blockIdx.x * WARPS + warp; r < count; r += gridDim.x * WARPS) {
        i64 n = !ids ? (i64)r : wide_ids ? ((const i64*)ids)[r] : (i64)((const int*)ids)[r];
        // A wrong id cannot be reported from here without waiting for the device: its row becomes NaN.
        bool valid = n >= 0 && n < rows;
        if (!valid) n = 0;
        const u8* row = qdata + n * columns + first_column;
        const scale_type* scales = absmax + n * blocks;
        scalar* target = out + (i64)r * width;
        for (int start = lane * 8; start < width; start += 256 * DEPTH) {
            uint2 q[DEPTH];
            float scale[DEPTH];
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                int c = start + 256 * d;
                if (c < width) {
                    q[d] = load_once((const uint2*)(row + c));
                    scale[d] = scale_value(scales[(first_column + c) >> block_log2]);
                }
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                int c = start + 256 * d;
                if (c < width) store_8(q[d], valid ? scale[d] : nan, mine, target + c);
            }
        }
    }
}

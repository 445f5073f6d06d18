// Streaming the matrix.
//
// Both products read the matrix as one sequence of steps, tile after tile, with the loads DEPTH steps ahead of the
// arithmetic, over the ends of tiles. A tile's steps are padded to a multiple of DEPTH, so that each buffer is a
// fixed set of registers; padded steps load nothing and count as weights with a scale of 0.

template <int LINES>
struct Step {
    uint4 q[LINES];  // 16 neighbouring weights of LINES rows
    scale_type scale[LINES];
};

// LINES rows a tile for this lane: `offset`, `offset` + stride, ... of each tile of `height` rows; columns from
// `lane_column` on, in steps of `width`.
template <int LINES>
struct Stream {
    const u8* qdata;
    const scale_type* absmax;
    int rows, columns, block_log2, blocks;
    int tile, tile_step, tiles, column, end;  // the cursor; tile_step tiles lie between two of this reader's
    int lane_column, width, height, offset, stride;

    __device__ __forceinline__ void load(Step<LINES>& s) {
        int first = tile * height;
        if (tile < tiles && column < columns) {
            const u8* q = qdata + ((i64)first * columns + column);
            const scale_type* a = absmax + ((i64)first * blocks + (column >> block_log2));
#pragma unroll
            for (int r = 0; r < LINES; r++) {
                // Rows past the end read the last one; nothing of them is stored.
                int n = min(offset + stride * r, rows - 1 - first);
                s.q[r] = load_once((const uint4*)(q + n * columns));
                s.scale[r] = a[n * blocks];
            }
        } else {
#pragma unroll
            for (int r = 0; r < LINES; r++) {
                s.q[r] = make_uint4(0, 0, 0, 0);
                s.scale[r] = 0;
            }
        }
        column += width;
        if (column >= end) {
            column = lane_column;
            tile += tile_step;
        }
    }
};

__device__ __forceinline__ u32 word(const uint4& v, int j) {
    return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// The four weights of q, rounded to the input's 16-bit type, in two packed pairs.
__device__ __forceinline__ void decode_4(u32 q, scale_form scale, table_ref mine, u32& first, u32& second) {
    float w[4];
    look_up(q, mine, w);
    first = pack(weight(w[0], scale), weight(w[1], scale));
    second = pack(weight(w[2], scale), weight(w[3], scale));
}

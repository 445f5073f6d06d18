// The operations on whole matrices: divides rows among threads and calls one instruction set's kernels.
#pragma once
#include "types.h"

namespace octavo {

// A quantized matrix as the caller hands it over: plain pointers of any alignment; see types.h for the layout.
struct Matrix {
  const uint8_t* qdata;
  const void* absmax;
  bool half_scales;
  const float* code;
  int64_t rows, columns, block;
};

struct Weight {
  const void* data;
  DType type;
  int64_t rows, columns;
};

// out [tokens, rows] = x [tokens, columns] Wᵀ + bias [rows] (or null), out in x's type.
void linear(const Kernels&, const Matrix&, const void* x, DType type, int64_t tokens, const void* bias, DType bias_type,
            void* out, int threads);

// Whether these kernels have `linear_gemm` for such a matrix.
bool has_gemm(const Kernels&, const Matrix&);

// As `linear`, x and out of bfloat16, for a block of tokens (prefill, training).
void linear_gemm(const Kernels&, const Matrix&, const void* x, int64_t tokens, const void* bias, DType bias_type, void* out,
                 int threads);

// As `linear` and `linear_transposed`, by tiles, for a block of tokens. False, and nothing done, where the kernels do not have it for such a
// matrix.
bool linear_tiles(const Kernels&, const Matrix&, const void* x, DType type, int64_t tokens, const void* bias, DType bias_type,
                  void* out, int threads);
bool linear_transposed_tiles(const Kernels&, const Matrix&, const void* x, DType type, int64_t tokens, void* out, int threads);

// out [tokens, columns] = x [tokens, rows] W, out in x's type.
void linear_transposed(const Kernels&, const Matrix&, const void* x, DType type, int64_t tokens, void* out, int threads);

// weight[row0:row1, col0:col1] → out, contiguous. col0 is a multiple of 64.
void dequantize(const Kernels&, const Matrix&, int64_t row0, int64_t row1, int64_t col0, int64_t col1, void* out,
                DType type, int threads);

// Rows `ids` → out [count, columns]. Returns the position of the first id outside [0, rows), or -1.
int64_t embedding(const Kernels&, const Matrix&, const int64_t* ids, int64_t count, void* out, DType type, int threads);

// Returns false if a weight is NaN or infinite; what was written is then of no use.
bool quantize(const Kernels&, const Weight&, const float* code, int64_t block, bool half_scales, uint8_t* qdata,
              void* absmax, int threads);

// Smallest positive and largest scale (0, 0 where all weights are zero). False as for `quantize`.
bool scale_range(const Kernels&, const Weight&, int64_t block, float* smallest, float* largest, int threads);

// Sums of (weight - quantized weight)² and of weight², of a row in float32, of the rows in float64.
void squared_error(const Kernels&, const void* weight, DType type, const Matrix&, double* error, double* power,
                   int threads);

// As octavo/ops/reference.py defines it → counts int64 [bins], overwritten. False as for `quantize`.
bool histogram(const Kernels&, const Weight&, int64_t block, int64_t bins, bool half_scales, int64_t* counts,
               int threads);

// Reads memory as fast as it comes, for measuring its bandwidth. Returns the exclusive or of its whole 64-bit words.
uint64_t read_through(const void* data, int64_t bytes, int threads);

}  // namespace octavo

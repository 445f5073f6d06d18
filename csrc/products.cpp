// Products with a quantized matrix, and taking it apart: out of 8 bits.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "driver.h"
#include "segments.h"

namespace octavo {

namespace {

// What rounding one token to fixed point has left: values - integers * unit, chunk by chunk, by the very arithmetic of `to_fixed`.
void take_out(const float* values, float top_word, int64_t columns, float* left) {
  // Adding and taking away 1.5 * 2^23 rounds to an integer, as the conversion does.
  constexpr float kRound = 12582912.0f;
  for (int64_t c = 0; c < chunks_of(columns); c++) {
    float top = 0.0f;
    for (int64_t k = c * kChunk; k < (c + 1) * kChunk; k++) top = std::max(top, std::fabs(values[k]));
    const float factor = top > 0.0f ? top_word / top : 0.0f, unit = top / top_word;
    for (int64_t k = c * kChunk; k < (c + 1) * kChunk; k++)
      left[k] = values[k] - ((values[k] * factor + kRound) - kRound) * unit;
  }
}

// Input as fixed point, in one plane or two. False if the values do not allow it.
bool fix_tokens(const Kernels& k, const Table& table, const float* values, int64_t tokens, int64_t columns, int64_t planes,
                Tokens& input) {
  static thread_local Scratch fixed_memory, units_memory, left_memory;
  const int64_t stride = padded(columns), chunks = chunks_of(columns);
  int16_t* integers = fixed_memory.get<int16_t>(tokens * planes * stride);
  float* units = units_memory.get<float>(tokens * planes * chunks);
  input.planes = planes;
  input.fixed = integers;
  input.units = units;
  if (planes == 1) return k.to_fixed(values, tokens, columns, table.fixed_unit, table.top_word, integers, units);
  float* left = left_memory.get<float>(stride);
  for (int64_t m = 0; m < tokens; m++, values += stride)
    for (int64_t plane = 0; plane < 2; plane++, integers += stride, units += chunks) {
      if (!k.to_fixed(plane ? left : values, 1, columns, table.fixed_unit, table.top_word, integers, units)) return false;
      if (!plane) take_out(values, table.top_word, columns, left);
    }
  return true;
}

// Most tokens of float32 that are taken in two planes; more are multiplied in float32.
constexpr int64_t kSplitTokens = 2;

}  // namespace

void linear(const Kernels& kernels, const Matrix& matrix, const void* x, DType type, int64_t tokens, const void* bias,
            DType bias_type, void* out, int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.rows == 0) return;
  const int64_t stride = padded(w.columns);
  static thread_local Scratch values_memory, bias_memory;

  Tokens input{tokens, stride, nullptr, 1, nullptr, nullptr};
  float* values = values_memory.get<float>(tokens * stride);
  kernels.widen(x, type, tokens, w.columns, values);
  input.values = values;

  Table table;
  bool fixed = kernels.to_fixed && scales_per_chunk(w.scales) <= 4;
  if (type == kFloat32) fixed = fixed && tokens <= kSplitTokens && kernels.byte_segments;
  const Kernels* k = &kernels_for(kernels, matrix.code, fixed, table);
  // Float32 is split only for codebooks that are integers: other tables would be rounded.
  const bool planes = type == kFloat32;
  if (fixed && planes && !table.integers) fixed = false, k->prepare(matrix.code, false, table);
  if (fixed && !fix_tokens(*k, table, values, tokens, w.columns, planes ? 2 : 1, input))
    fixed = false, k->prepare(matrix.code, false, table);

  Output output{out, type, w.rows, nullptr};
  if (bias) {
    float* wide = bias_memory.get<float>(padded(w.rows));
    kernels.widen(bias, bias_type, 1, w.rows, wide);
    output.bias = wide;
  }
  const auto dot = fixed ? k->dot_fixed : k->dot;
  const Split split(w.rows, std::max<int64_t>(1, w.columns), threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t row0 = task * split.step, row1 = std::min(row0 + split.step, w.rows);
    dot(w, table, input, row0, row1, output, kernel_scratch(w.columns));
  });
}

// Rows of a task: of all multiples of 16, the largest that leaves the busiest thread the fewest rows.
int64_t gemm_rows(int64_t rows, int64_t threads) {
  int64_t best = kGemmRows, least_rows = std::numeric_limits<int64_t>::max();
  for (int64_t step = kGemmRows; step > 0; step -= 16) {
    const int64_t busiest = ceil_div(ceil_div(rows, step), threads) * step;
    if (busiest < least_rows) {
      best = step;
      least_rows = busiest;
    }
  }
  return best;
}

bool has_gemm(const Kernels& k, const Matrix& matrix) { return k.gemm && scales_per_chunk(packed(matrix).scales) <= 4; }

void linear_gemm(const Kernels& k, const Matrix& matrix, const void* x, int64_t tokens, const void* bias, DType bias_type,
                 void* out, int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.rows == 0) return;
  static thread_local Scratch values_memory, bias_memory;
  const int64_t panels = ceil_div(w.columns, kGemmColumns);
  uint16_t* values = values_memory.get<uint16_t>(panels * tokens * kGemmColumns);
  const Split copies(tokens, w.columns, threads);
  parallel(copies.tasks, copies.threads, [&](int64_t task, int) {
    for (int64_t m = task * copies.step; m < std::min((task + 1) * copies.step, tokens); m++)
      for (int64_t p = 0; p < panels; p++) {
        uint16_t* target = values + (p * tokens + m) * kGemmColumns;
        const int64_t first = p * kGemmColumns, count = std::min(kGemmColumns, w.columns - first);
        std::memcpy(target, static_cast<const char*>(x) + (m * w.columns + first) * 2, static_cast<size_t>(count) * 2);
        std::fill(target + count, target + kGemmColumns, uint16_t{0});
      }
  });
  const GemmInput input{tokens, values};
  Table table;
  k.prepare(matrix.code, false, table);
  Output output{out, kBFloat16, w.rows, nullptr};
  if (bias) {
    float* wide = bias_memory.get<float>(padded(w.rows));
    k.widen(bias, bias_type, 1, w.rows, wide);
    output.bias = wide;
  }
  const int64_t work = w.rows * std::max<int64_t>(1, w.columns);
  const int used = static_cast<int>(std::clamp<int64_t>(work / kThreadWeights, 1, std::max(1, threads)));
  const int64_t step = gemm_rows(w.rows, used), tasks = ceil_div(w.rows, step);
  parallel(tasks, used, [&](int64_t task, int) {
    static thread_local Scratch memory;
    constexpr int64_t group = 4 * kGemmScaled / kChunk * 16, scales = kGemmRows / 16 * group;
    constexpr int64_t panel = kGemmColumns * kGemmPanel / 2;
    const int64_t partial = kGemmRows * std::min(tokens, kGemmTokens);
    float* start = memory.get<float>(scales + group + panel + partial);
    const GemmScratch scratch{start, start + scales, start + scales + group + panel,
                              reinterpret_cast<uint16_t*>(start + scales + group)};
    const int64_t row0 = task * step;
    k.gemm(w, table, input, row0, std::min(row0 + step, w.rows), output, scratch);
  });
}

namespace {

// Room for a product by tiles, kept by each thread.
TileScratch tile_scratch() {
  static thread_local Scratch memory;
  constexpr int64_t scales = 4 * kTileColumns / kChunk * kTileRows, tiles = 4 * kTileColumns * kTileRows;
  constexpr int64_t sums = std::max(kTileTask * kTileTokens, kTransposedChunks * kChunk * kTransposedTokens);
  float* start = memory.get<float>(scales + tiles + sums);
  return {start + scales + tiles, start, start + scales, reinterpret_cast<int16_t*>(start + scales)};
}

// run(its tokens, item) for every item and every `most` tokens or fewer. Neighbouring tasks share their tokens: what one core reads of
// the input, it reads again soon.
template <class F>
void by_tokens(const TileTokens& input, int64_t most, int64_t items, int threads, F&& run) {
  parallel(items * ceil_div(input.count, most), threads, [&](int64_t task, int) {
    TileTokens part = input;
    part.from = task / items * most;
    part.to = std::min(part.from + most, input.count);
    run(part, task % items);
  });
}

// Input of a product by tiles, over `columns`: integers for a `run` that is not 0, if the values allow them, else float32.
TileTokens tile_tokens(const Kernels& k, const void* x, DType type, int64_t tokens, int64_t columns, int64_t run, float top_word,
                       int threads) {
  static thread_local Scratch values_memory, units_memory;
  const int64_t panels = ceil_div(columns, kTileColumns);
  TileTokens input{tokens, nullptr, nullptr, nullptr, run, 0, tokens};
  float* floats = run ? nullptr : values_memory.get<float>(panels * tokens * kTileColumns);
  int16_t* words = run ? values_memory.get<int16_t>(panels * tokens * kTileColumns) : nullptr;
  const int64_t per_token = run ? kTileColumns / run : 0;
  float* units = run ? units_memory.get<float>(panels * tokens * per_token) : nullptr;
  std::atomic<bool> usable{true};
  const Split copies(tokens, columns, threads);
  parallel(copies.tasks, copies.threads, [&](int64_t task, int) {
    for (int64_t m = task * copies.step; m < std::min((task + 1) * copies.step, tokens); m++)
      for (int64_t p = 0; p < panels; p++) {
        const int64_t at = p * tokens + m, first = p * kTileColumns;
        if (!k.tile_input(x, type, m * columns + first, std::min(kTileColumns, columns - first), run, top_word,
                          floats ? floats + at * kTileColumns : nullptr, words ? words + at * kTileColumns : nullptr,
                          units ? units + at * per_token : nullptr))
          usable.store(false, std::memory_order_relaxed);
      }
  });
  if (!usable.load()) return tile_tokens(k, x, type, tokens, columns, 0, 0.0f, threads);
  input.floats = floats;
  input.words = words;
  input.units = units;
  return input;
}

// Columns that integers are summed up for, and the largest integer that an input becomes, so that the sums stay below 2^31. For
// bfloat16 11 to 13 bits are exact enough; float16 takes shorter sums of longer integers. 0: float32.
int64_t word_run(DType type, const Segments& segments, int64_t per_chunk, float* top_word) {
  const float entries = 1.0f / segments.unit;
  if (type == kFloat32 || (type == kFloat16 && entries > 8192.0f)) return 0;
  const int64_t run = std::min<int64_t>(type == kFloat16 ? 32 : 64, kChunk / per_chunk);
  *top_word = std::min(32767.0f, std::floor(2147483647.0f / (static_cast<float>(run) * entries) - 0.5f));
  return run;
}

// The kernels that multiply such a matrix by tiles, and the codebook's table for them; null where there are none.
const Kernels* tile_kernels(const Kernels& kernels, const Packed& w, const float* code, Table& table) {
  if (!kernels.tiles || !w.scales.half || scales_per_chunk(w.scales) > 4) return nullptr;
  const Kernels& k = kernels_for(kernels.tiles(), code, false, table);
  return k.tile ? &k : nullptr;
}

int used_threads(const Packed& w, int threads) {
  const int64_t work = w.rows * std::max<int64_t>(1, w.columns);
  return static_cast<int>(std::clamp<int64_t>(work / kThreadWeights, 1, std::max(1, threads)));
}

}  // namespace

bool linear_tiles(const Kernels& kernels, const Matrix& matrix, const void* x, DType type, int64_t tokens, const void* bias,
                  DType bias_type, void* out, int threads) {
  const Packed w = packed(matrix);
  Table table;
  const Kernels* found = tile_kernels(kernels, w, matrix.code, table);
  if (!found) return false;
  const Kernels& k = *found;
  if (tokens == 0 || w.rows == 0) return true;
  static thread_local Scratch bias_memory;
  float top_word = 0.0f;
  const int64_t run = word_run(type, table.segments, scales_per_chunk(w.scales), &top_word);
  const TileTokens input = tile_tokens(k, x, type, tokens, w.columns, run, top_word, threads);
  Output output{out, type, w.rows, nullptr};
  if (bias) {
    float* wide = bias_memory.get<float>(padded(w.rows));
    k.widen(bias, bias_type, 1, w.rows, wide);
    output.bias = wide;
  }
  by_tokens(input, kTileTokens, ceil_div(w.rows, kTileTask), used_threads(w, threads), [&](const TileTokens& part, int64_t item) {
    const int64_t row0 = item * kTileTask;
    k.tile(w, table, part, row0, std::min(row0 + kTileTask, w.rows), output, tile_scratch());
  });
  return true;
}

bool linear_transposed_tiles(const Kernels& kernels, const Matrix& matrix, const void* x, DType type, int64_t tokens, void* out,
                             int threads) {
  const Packed w = packed(matrix);
  Table table;
  const Kernels* found = tile_kernels(kernels, w, matrix.code, table);
  if (!found) return false;
  const Kernels& k = *found;
  if (tokens == 0 || w.columns == 0) return true;
  const TileTokens input = tile_tokens(k, x, type, tokens, w.rows, 0, 0.0f, threads);
  const Output output{out, type, w.columns, nullptr};
  // Few enough chunks to a task that every thread has two.
  const int used = used_threads(w, threads);
  const int64_t chunks = chunks_of(w.columns), wanted = ceil_div(2 * used, ceil_div(tokens, kTransposedTokens));
  const int64_t items = std::min(chunks, std::max(ceil_div(chunks, kTransposedChunks), wanted));
  by_tokens(input, kTransposedTokens, items, used, [&](const TileTokens& part, int64_t item) {
    k.tile_transposed(w, table, part, item * chunks / items, (item + 1) * chunks / items, output, tile_scratch());
  });
  return true;
}

void linear_transposed(const Kernels& kernels, const Matrix& matrix, const void* x, DType type, int64_t tokens, void* out,
                       int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.columns == 0) return;
  static thread_local Scratch values_memory;
  const int64_t stride = padded(w.rows);
  float* values = values_memory.get<float>(tokens * stride);
  kernels.widen(x, type, tokens, w.rows, values);
  Table table;
  const Kernels& k = kernels_for(kernels, matrix.code, false, table);

  // Columns are cut, not rows, so each sum is one thread's and comes out the same for any number of threads.
  constexpr int64_t kColumns = 512;
  const int64_t tasks = ceil_div(w.columns, kColumns);
  const int64_t weights = w.rows * w.columns;
  const int used = static_cast<int>(std::clamp<int64_t>(weights / kThreadWeights, 1, std::max(1, threads)));
  parallel(tasks, used, [&](int64_t task, int) {
    static thread_local Scratch sums_memory;
    const int64_t col0 = task * kColumns, col1 = std::min(col0 + kColumns, w.columns), width = padded(col1 - col0);
    float* sums = sums_memory.get<float>(tokens * width);
    std::fill(sums, sums + tokens * width, 0.0f);
    k.transposed(w, table, values, stride, tokens, col0, col1, sums, width, kernel_scratch(w.columns));
    for (int64_t m = 0; m < tokens; m++)
      k.narrow(sums + m * width, col1 - col0, out, type, m * w.columns + col0);
  });
}

void dequantize(const Kernels& kernels, const Matrix& matrix, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                void* out, DType type, int threads) {
  const Packed w = packed(matrix);
  const int64_t width = col1 - col0;
  if (row1 <= row0 || width <= 0) return;
  Table table;
  const Kernels& k = kernels_for(kernels, matrix.code, false, table);
  const Split split(row1 - row0, width, threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t first = row0 + task * split.step, last = std::min(first + split.step, row1);
    char* target = static_cast<char*>(out) + (first - row0) * width * static_cast<int64_t>(size_of(type));
    k.dequantize(w, table, first, last, col0, col1, target, type, width, kernel_scratch(w.columns));
  });
}

int64_t embedding(const Kernels& kernels, const Matrix& matrix, const int64_t* ids, int64_t count, void* out, DType type,
                  int threads) {
  const Packed w = packed(matrix);
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= w.rows) return i;
  if (count == 0 || w.columns == 0) return -1;
  Table table;
  const Kernels& k = kernels_for(kernels, matrix.code, false, table);
  const Split split(count, w.columns, threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    for (int64_t i = task * split.step; i < std::min((task + 1) * split.step, count); i++) {
      char* target = static_cast<char*>(out) + i * w.columns * static_cast<int64_t>(size_of(type));
      k.dequantize(w, table, ids[i], ids[i] + 1, 0, w.columns, target, type, w.columns, kernel_scratch(w.columns));
    }
  });
  return -1;
}

}  // namespace octavo

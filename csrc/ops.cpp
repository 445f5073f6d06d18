#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "engine.h"
#include "half.h"
#include "parallel.h"

namespace octavo {
namespace {

// Weights to a thread, below which another is not worth it (five microseconds of work, where starting and joining takes one or
// two), and weights of a task: small enough to balance two threads, large enough to stream.
constexpr int64_t kThreadWeights = 1 << 17;
constexpr int64_t kTaskWeights = 1 << 17;
constexpr int64_t kLeastTaskWeights = 1 << 13;

constexpr float kHistogramUnit = 1073741824.0f;  // 2^30, as in reference.py

// Memory that a thread keeps for the next call, aligned to a cache line.
class Scratch {
 public:
  ~Scratch() { release(); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t(64));
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

float* kernel_scratch(int64_t columns) {
  static thread_local Scratch scratch;
  return scratch.get<float>(scratch_floats(columns));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How rows (or other items of `item` weights each) are cut into tasks.
struct Split {
  int64_t step, tasks;
  int threads;

  Split(int64_t items, int64_t item, int threads_allowed) {
    const int64_t weights = std::max<int64_t>(1, items * item);
    threads = static_cast<int>(std::clamp<int64_t>(weights / kThreadWeights, 1, std::max(1, threads_allowed)));
    const int64_t share = ceil_div(weights, 4 * static_cast<int64_t>(threads));
    const int64_t target = std::clamp(share, kLeastTaskWeights, kTaskWeights);
    step = std::max<int64_t>(1, target / std::max<int64_t>(1, item));
    tasks = ceil_div(items, step);
  }
};

Scales scales_of(const void* absmax, bool half, int64_t columns, int64_t block) {
  // A block longer than a row is the row.
  const int64_t b = std::max<int64_t>(1, std::min(block, columns));
  return {absmax, half, b, ceil_div(columns, b)};
}

Packed packed(const Matrix& w) {
  return {w.qdata, scales_of(w.absmax, w.half_scales, w.columns, w.block), w.rows, w.columns};
}

Search search_of(const float* code) {
  float middle[255];
  for (int i = 0; i < 255; i++) {
    float a, b;
    std::memcpy(&a, code + i, 4);
    std::memcpy(&b, code + i + 1, 4);
    middle[i] = (a + b) * 0.5f;
  }
  Search s{};
  for (int level = 0; level < 8; level++)
    for (int i = 0; i < 1 << level; i++) s.level[level][i] = middle[((2 * i + 1) << (7 - level)) - 1];
  return s;
}

const char* row_of(const Weight& w, int64_t n) {
  return static_cast<const char*>(w.data) + n * w.columns * static_cast<int64_t>(size_of(w.type));
}

}  // namespace

void linear(const Kernels& k, const Matrix& matrix, const void* x, DType type, int64_t tokens, const void* bias,
            DType bias_type, void* out, int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.rows == 0) return;
  const int64_t stride = padded(w.columns);
  static thread_local Scratch values_memory, fixed_memory, units_memory, bias_memory;

  Tokens input{tokens, stride, nullptr, nullptr, nullptr};
  float* values = values_memory.get<float>(tokens * stride);
  k.widen(x, type, tokens, w.columns, values);
  input.values = values;

  Table table;
  bool fixed = k.to_fixed && type != kFloat32 && parts_of(w.scales) <= 4;
  if (fixed) {
    k.prepare(matrix.code, true, table);
    int16_t* integers = fixed_memory.get<int16_t>(tokens * stride);
    float* units = units_memory.get<float>(tokens * stride / kChunk);
    fixed = k.to_fixed(values, tokens, w.columns, table.fixed_unit, integers, units);
    input.fixed = integers;
    input.units = units;
  }
  if (!fixed) k.prepare(matrix.code, false, table);

  Output output{out, type, w.rows, nullptr};
  if (bias) {
    float* wide = bias_memory.get<float>(padded(w.rows));
    k.widen(bias, bias_type, 1, w.rows, wide);
    output.bias = wide;
  }
  const auto dot = fixed ? k.dot_fixed : k.dot;
  const Split split(w.rows, std::max<int64_t>(1, w.columns), threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t row0 = task * split.step, row1 = std::min(row0 + split.step, w.rows);
    dot(w, table, input, row0, row1, output, kernel_scratch(w.columns));
  });
}

// Rows of a task: of all multiples of 16, the largest that leaves the busiest thread the fewest rows.
int64_t many_rows(int64_t rows, int64_t threads) {
  int64_t best = kManyRows, least_rows = std::numeric_limits<int64_t>::max();
  for (int64_t step = kManyRows; step > 0; step -= 16) {
    const int64_t busiest = ceil_div(ceil_div(rows, step), threads) * step;
    if (busiest < least_rows) {
      best = step;
      least_rows = busiest;
    }
  }
  return best;
}

bool has_many(const Kernels& k, const Matrix& matrix) { return k.many && parts_of(packed(matrix).scales) <= 4; }

void linear_many(const Kernels& k, const Matrix& matrix, const void* x, int64_t tokens, const void* bias, DType bias_type,
                 void* out, int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.rows == 0) return;
  static thread_local Scratch values_memory, bias_memory;
  const int64_t panels = ceil_div(w.columns, kManyColumns);
  uint16_t* values = values_memory.get<uint16_t>(panels * tokens * kManyColumns);
  const Split copies(tokens, w.columns, threads);
  parallel(copies.tasks, copies.threads, [&](int64_t task, int) {
    for (int64_t m = task * copies.step; m < std::min((task + 1) * copies.step, tokens); m++)
      for (int64_t p = 0; p < panels; p++) {
        uint16_t* target = values + (p * tokens + m) * kManyColumns;
        const int64_t first = p * kManyColumns, count = std::min(kManyColumns, w.columns - first);
        std::memcpy(target, static_cast<const char*>(x) + (m * w.columns + first) * 2, static_cast<size_t>(count) * 2);
        std::fill(target + count, target + kManyColumns, uint16_t{0});
      }
  });
  const ManyTokens input{tokens, values};
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
  const int64_t step = many_rows(w.rows, used), tasks = ceil_div(w.rows, step);
  parallel(tasks, used, [&](int64_t task, int) {
    static thread_local Scratch memory;
    constexpr int64_t group = 4 * kManyScaled / kChunk * 16, scales = kManyRows / 16 * group;
    constexpr int64_t panel = kManyColumns * kManyPanel / 2;
    const int64_t partial = kManyRows * std::min(tokens, kManyTokens);
    float* start = memory.get<float>(scales + group + panel + partial);
    const ManyScratch scratch{start, start + scales, start + scales + group + panel,
                              reinterpret_cast<uint16_t*>(start + scales + group)};
    const int64_t row0 = task * step;
    k.many(w, table, input, row0, std::min(row0 + step, w.rows), output, scratch);
  });
}

void linear_transposed(const Kernels& k, const Matrix& matrix, const void* x, DType type, int64_t tokens, void* out,
                       int threads) {
  const Packed w = packed(matrix);
  if (tokens == 0 || w.columns == 0) return;
  static thread_local Scratch values_memory;
  const int64_t stride = padded(w.rows);
  float* values = values_memory.get<float>(tokens * stride);
  k.widen(x, type, tokens, w.rows, values);
  Table table;
  k.prepare(matrix.code, false, table);

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

void dequantize(const Kernels& k, const Matrix& matrix, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                void* out, DType type, int threads) {
  const Packed w = packed(matrix);
  const int64_t width = col1 - col0;
  if (row1 <= row0 || width <= 0) return;
  Table table;
  k.prepare(matrix.code, false, table);
  const Split split(row1 - row0, width, threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t first = row0 + task * split.step, last = std::min(first + split.step, row1);
    char* target = static_cast<char*>(out) + (first - row0) * width * static_cast<int64_t>(size_of(type));
    k.dequantize(w, table, first, last, col0, col1, target, type, width, kernel_scratch(w.columns));
  });
}

int64_t embedding(const Kernels& k, const Matrix& matrix, const int64_t* ids, int64_t count, void* out, DType type,
                  int threads) {
  const Packed w = packed(matrix);
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= w.rows) return i;
  if (count == 0 || w.columns == 0) return -1;
  Table table;
  k.prepare(matrix.code, false, table);
  const Split split(count, w.columns, threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    for (int64_t i = task * split.step; i < std::min((task + 1) * split.step, count); i++) {
      char* target = static_cast<char*>(out) + i * w.columns * static_cast<int64_t>(size_of(type));
      k.dequantize(w, table, ids[i], ids[i] + 1, 0, w.columns, target, type, w.columns, kernel_scratch(w.columns));
    }
  });
  return -1;
}

bool quantize(const Kernels& k, const Weight& weight, const float* code, int64_t block, bool half_scales,
              uint8_t* qdata, void* absmax, int threads) {
  const int64_t columns = weight.columns;
  if (weight.rows == 0 || columns == 0) return true;
  const Search search = search_of(code);
  const int64_t per_row = scales_of(nullptr, false, columns, block).per_row;
  const Split split(weight.rows, columns, threads);
  std::atomic<bool> finite{true};
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    static thread_local Scratch absmax_memory;
    const int64_t row0 = task * split.step, rows = std::min(split.step, weight.rows - row0), count = rows * per_row;
    const int64_t clipped = scales_of(nullptr, false, columns, block).block;
    float* scratch = kernel_scratch(columns);
    float* largest = absmax_memory.get<float>(count);
    if (!k.absmax(row_of(weight, row0), weight.type, rows, columns, clipped, largest, scratch)) {
      finite.store(false, std::memory_order_relaxed);
      return;
    }
    char* scales = static_cast<char*>(absmax) + row0 * per_row * (half_scales ? 2 : 4);
    if (half_scales) {
      for (int64_t i = 0; i < count; i++) {
        const uint16_t h = round_up_to_float16(largest[i]);
        std::memcpy(scales + 2 * i, &h, 2);
      }
    } else {
      std::memcpy(scales, largest, static_cast<size_t>(count) * 4);
    }
    k.encode(row_of(weight, row0), weight.type, rows, columns, scales_of(scales, half_scales, columns, block), search,
             qdata + row0 * columns, scratch);
  });
  return finite.load();
}

bool scale_range(const Kernels& k, const Weight& weight, int64_t block, float* smallest, float* largest, int threads) {
  const int64_t columns = weight.columns;
  *smallest = *largest = 0.0f;
  if (weight.rows == 0 || columns == 0) return true;
  const Scales shape = scales_of(nullptr, false, columns, block);
  const Split split(weight.rows, columns, threads);
  struct alignas(64) Range {
    float low = std::numeric_limits<float>::infinity(), high = 0.0f;
    bool finite = true;
  };
  std::vector<Range> ranges(static_cast<size_t>(split.threads));
  parallel(split.tasks, split.threads, [&](int64_t task, int worker) {
    static thread_local Scratch absmax_memory;
    const int64_t row0 = task * split.step, rows = std::min(split.step, weight.rows - row0);
    float* found = absmax_memory.get<float>(rows * shape.per_row);
    Range& range = ranges[static_cast<size_t>(worker)];
    if (!k.absmax(row_of(weight, row0), weight.type, rows, columns, shape.block, found, kernel_scratch(columns)))
      range.finite = false;
    for (int64_t i = 0; i < rows * shape.per_row; i++) {
      if (found[i] > 0.0f && found[i] < range.low) range.low = found[i];
      if (found[i] > range.high) range.high = found[i];
    }
  });
  Range all;
  for (const Range& r : ranges) {
    all.low = std::min(all.low, r.low);
    all.high = std::max(all.high, r.high);
    all.finite = all.finite && r.finite;
  }
  if (all.high > 0.0f) {
    *smallest = all.low;
    *largest = all.high;
  }
  return all.finite;
}

void squared_error(const Kernels& k, const void* weight, DType type, const Matrix& matrix, double* error, double* power,
                   int threads) {
  const Packed w = packed(matrix);
  *error = *power = 0.0;
  if (w.rows == 0 || w.columns == 0) return;
  Table table;
  k.prepare(matrix.code, false, table);
  std::vector<float> errors(static_cast<size_t>(w.rows)), powers(errors.size());
  const Split split(w.rows, w.columns, threads);
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t row0 = task * split.step, row1 = std::min(row0 + split.step, w.rows);
    k.deviate(weight, type, w, table, row0, row1, &errors[static_cast<size_t>(row0)], &powers[static_cast<size_t>(row0)],
              kernel_scratch(w.columns));
  });
  for (size_t n = 0; n < errors.size(); n++) {
    *error += errors[n];
    *power += powers[n];
  }
}

bool histogram(const Kernels& k, const Weight& weight, int64_t block, int64_t bins, bool half_scales, int64_t* counts,
               int threads) {
  const int64_t columns = weight.columns;
  std::fill(counts, counts + bins, int64_t{0});
  if (weight.rows == 0 || columns == 0) return true;
  const Scales shape = scales_of(nullptr, false, columns, block);
  const int64_t per_row = shape.per_row;
  const Split split(weight.rows, columns, threads);
  const auto scales = std::make_unique<float[]>(static_cast<size_t>(weight.rows * per_row));
  std::atomic<bool> finite{true};
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    const int64_t row0 = task * split.step, rows = std::min(split.step, weight.rows - row0);
    float* found = scales.get() + row0 * per_row;
    if (!k.absmax(row_of(weight, row0), weight.type, rows, columns, shape.block, found, kernel_scratch(columns)))
      finite.store(false, std::memory_order_relaxed);
    if (half_scales)
      for (int64_t i = 0; i < rows * per_row; i++) found[i] = from_float16(round_up_to_float16(found[i]));
  });
  if (!finite.load()) return false;
  float largest = 0.0f;
  for (int64_t i = 0; i < weight.rows * per_row; i++) largest = std::max(largest, scales[i]);
  if (!(largest > 0.0f)) return true;

  // Integer counts: their sum does not depend on which thread counted what.
  std::vector<std::vector<int64_t>> counted(static_cast<size_t>(split.threads));
  parallel(split.tasks, split.threads, [&](int64_t task, int worker) {
    static thread_local Scratch mass_memory;
    std::vector<int64_t>& own = counted[static_cast<size_t>(worker)];
    if (own.empty()) own.resize(static_cast<size_t>(bins));
    const int64_t row0 = task * split.step, rows = std::min(split.step, weight.rows - row0), n = rows * per_row;
    const float* found = scales.get() + row0 * per_row;
    int64_t* masses = mass_memory.get<int64_t>(n);
    for (int64_t i = 0; i < n; i++) {
      const float ratio = found[i] / largest;
      masses[i] = std::llrint(ratio * ratio * kHistogramUnit);
    }
    k.count(row_of(weight, row0), weight.type, rows, columns, {found, false, shape.block, per_row}, masses, bins,
            own.data(), kernel_scratch(columns));
  });
  for (const std::vector<int64_t>& own : counted)
    for (size_t b = 0; b < own.size(); b++) counts[b] += own[b];
  return true;
}

uint64_t read_through(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kWords = 32;  // read side by side
  const int64_t line = kWords * 8, lines = bytes / line;
  const Split split(lines, line, threads);
  std::atomic<uint64_t> all{0};
  parallel(split.tasks, split.threads, [&](int64_t task, int) {
    uint64_t found[kWords] = {}, now[kWords];
    const char* p = static_cast<const char*>(data) + task * split.step * line;
    for (int64_t i = task * split.step; i < std::min((task + 1) * split.step, lines); i++, p += line) {
      // As far ahead as the kernels do, so that this is the most a core can read.
      for (int64_t l = 0; l < line; l += 64) OCTAVO_PREFETCH(p + kPrefetch + l);
      std::memcpy(now, p, sizeof now);
      for (int64_t w = 0; w < kWords; w++) found[w] ^= now[w];
    }
    for (int64_t w = 1; w < kWords; w++) found[0] ^= found[w];
    all.fetch_xor(found[0], std::memory_order_relaxed);
  });
  return all.load();
}

}  // namespace octavo

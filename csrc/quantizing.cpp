// Into 8 bits: quantizing, what fitting a codebook needs to know of a matrix, and the error made.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "driver.h"
#include "half.h"
#include "segments.h"

namespace octavo {
namespace {

constexpr float kHistogramUnit = 16384.0f, kHistogramCap = 256.0f;  // as in reference.py

Search search_of(const float* code) {
  float boundary[255];
  for (int i = 0; i < 255; i++) {
    float a, b;
    std::memcpy(&a, code + i, 4);
    std::memcpy(&b, code + i + 1, 4);
    boundary[i] = (a + b) * 0.5f;
  }
  Search s{};
  for (int level = 0; level < 8; level++)
    for (int i = 0; i < 1 << level; i++) s.level[level][i] = boundary[((2 * i + 1) << (7 - level)) - 1];
  return s;
}

const char* row_of(const Weight& w, int64_t n) {
  return static_cast<const char*>(w.data) + n * w.columns * static_cast<int64_t>(size_of(w.type));
}

}  // namespace

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

void squared_error(const Kernels& kernels, const void* weight, DType type, const Matrix& matrix, double* error, double* power,
                   int threads) {
  const Packed w = packed(matrix);
  *error = *power = 0.0;
  if (w.rows == 0 || w.columns == 0) return;
  Table table;
  const Kernels& k = kernels_for(kernels, matrix.code, false, table);
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
  std::vector<float> positive;
  for (int64_t i = 0; i < weight.rows * per_row; i++)
    if (scales[i] > 0.0f) positive.push_back(scales[i]);
  if (positive.empty()) return true;
  const auto middle = positive.begin() + static_cast<std::ptrdiff_t>((positive.size() - 1) / 2);
  std::nth_element(positive.begin(), middle, positive.end());
  const float median = *middle;

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
      const float ratio = std::min(found[i] / median, kHistogramCap);
      masses[i] = std::llrint(ratio * ratio * kHistogramUnit);
    }
    k.count(row_of(weight, row0), weight.type, rows, columns, {found, false, shape.block, per_row}, masses, bins,
            own.data(), kernel_scratch(columns));
  });
  for (const std::vector<int64_t>& own : counted)
    for (size_t b = 0; b < own.size(); b++) counts[b] += own[b];
  return true;
}

}  // namespace octavo

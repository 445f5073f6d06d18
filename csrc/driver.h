// What the drivers (products.cpp, quantizing.cpp) share: how work is cut into tasks, and memory that threads keep.
#pragma once
#include <algorithm>
#include <new>

#include "ops.h"
#include "parallel.h"

namespace octavo {
namespace {

// Weights to a thread, below which another is not worth it (five microseconds of work, where starting and joining takes one or
// two), and weights of a task: small enough to balance two threads, large enough to stream.
constexpr int64_t kThreadWeights = 1 << 17;
constexpr int64_t kTaskWeights = 1 << 17;
constexpr int64_t kLeastTaskWeights = 1 << 13;

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

inline float* kernel_scratch(int64_t columns) {
  static thread_local Scratch scratch;
  return scratch.get<float>(scratch_floats(columns));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

inline Scales scales_of(const void* absmax, bool half, int64_t columns, int64_t block) {
  // A block longer than a row is the row.
  const int64_t b = std::max<int64_t>(1, std::min(block, columns));
  return {absmax, half, b, ceil_div(columns, b)};
}

inline Packed packed(const Matrix& w) {
  return {w.qdata, scales_of(w.absmax, w.half_scales, w.columns, w.block), w.rows, w.columns};
}

}  // namespace
}  // namespace octavo

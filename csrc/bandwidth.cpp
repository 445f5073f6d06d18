// How fast memory is read: the limit of a product of one token.
#include <atomic>
#include <cstring>

#include "driver.h"
#include "engine.h"

namespace octavo {

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

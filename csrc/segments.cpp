#include "segments.h"

#include <cstring>

namespace octavo {

bool find_segments(const float* code, Segments& out) {
  int32_t entries[256];
  int32_t differences = 0, bits = 0, steepest = 0;
  for (int i = 0; i < 256; i++) {
    float value;
    std::memcpy(&value, code + i, 4);
    // Written so that NaN is refused too.
    if (!(value >= -1.0f && value <= 1.0f)) return false;
    const float scaled = value * 16384.0f;
    entries[i] = static_cast<int32_t>(scaled);
    differences |= static_cast<float>(entries[i]) != scaled;
    bits |= entries[i];
  }
  if (differences) return false;
  for (int h = 0; h < 16; h++) {
    const int32_t* run = entries + 16 * h;
    const int32_t slope = run[1] - run[0];
    for (int l = 1; l < 16; l++) differences |= run[l] - run[l - 1] - slope;
    if (slope > steepest) steepest = slope;
    differences |= slope < 0;
  }
  if (differences) return false;
  // The largest unit of which all entries are multiples.
  int shift = 0;
  while (shift < 3 && !(bits >> shift & 1)) shift++;
  const int32_t step = 128 >> shift;
  out.unit = static_cast<float>(1 << shift) / 16384.0f;
  out.step = static_cast<uint8_t>(step);
  out.bytes = steepest >> shift <= 127;
  out.top_word = shift ? 32767.0f : 16383.0f;
  for (int h = 0; h < 16; h++) {
    const int32_t base = entries[16 * h] / (1 << shift), slope = (entries[16 * h + 1] - entries[16 * h]) >> shift;
    for (int b = 0; b < 2; b++) {
      out.base[b][h] = static_cast<uint8_t>(static_cast<uint32_t>(base) >> (8 * b));
      out.slope[b][h] = static_cast<uint8_t>(slope >> (8 * b));
    }
    out.bytes = out.bytes && base % step == 0 && base / step <= 127;
    out.base_byte[h] = static_cast<int8_t>(base / step);
  }
  return true;
}

const Kernels& kernels_for(const Kernels& k, const float* code, bool fixed, Table& table) {
  table.top_word = 32767.0f;
  if (k.byte_segments && find_segments(code, table.segments)) {
    const Kernels& segmented = table.segments.bytes ? *k.byte_segments : *k.wide_segments;
    segmented.prepare(code, fixed, table);
    return segmented;
  }
  k.prepare(code, fixed, table);
  return k;
}

}  // namespace octavo

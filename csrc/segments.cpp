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

bool find_dynamic(const float* code, Dynamic& out) {
  float p[129];
  for (int a = 0; a <= 128; a++) std::memcpy(p + a, code + 127 + a, 4);
  // The map ends in 1 and begins with 0. Written so that NaN is refused too.
  if (!(p[0] == 0.0f && p[128] == 1.0f)) return false;
  // The exponent of 1/2 is that of 128 1/2 in its lowest three bits: one line goes through both.
  for (int k = 0; k < 7; k++) {
    const int first = 1 << k, last = 2 * first - 1, at = (k + 7) & 7;  // the exponent is stored with 127 added
    const double slope = k ? (static_cast<double>(p[last]) - p[first]) / (last - first) : 0.0;
    out.slope[at] = static_cast<float>(slope);
    out.constant[at] = static_cast<float>(p[first] - slope * (first + 0.5));
  }
  out.slope[6] = 1.0f / 128.0f;
  out.constant[6] = -0.5f / 128.0f;
  for (int h = 0; h < 16; h++) {
    const int a = h < 8 ? 16 * h : 0;
    const double slope = a ? (static_cast<double>(p[a + 15]) - p[a]) / 15 : 0.0;
    const int32_t base = static_cast<int32_t>(p[a] * 16383.0 + 0.5), step = static_cast<int32_t>(slope * 16 * 16383.0 + 0.5);
    if (base < 0 || base > 32767 || step < 0 || step > 32767) return false;
    for (int b = 0; b < 2; b++) {
      out.base[b][h] = static_cast<uint8_t>(base >> (8 * b));
      out.step[b][h] = static_cast<uint8_t>(step >> (8 * b));
    }
    const double small = p[h] * 16383.0 + 0.5;
    if (!(small < 256.0)) return false;
    out.small[h] = static_cast<uint8_t>(small);
  }
  for (int a = 0; a <= 128; a++) {
    float value, negative = -p[a];
    if (a < 128) std::memcpy(&negative, code + 127 - a, 4);
    const float half = static_cast<float>(a) + 0.5f;
    uint32_t bits;
    std::memcpy(&bits, &half, 4);
    value = out.constant[bits >> 23 & 7] + out.slope[bits >> 23 & 7] * half;
    if (!(value - p[a] <= 1e-6f * p[a] && p[a] - value <= 1e-6f * p[a] && negative == -p[a])) return false;
    // 128 counts as 127 and half a step.
    const int h = a < 128 ? a >> 4 : 7;
    const int32_t eighths = a < 128 ? 8 * (a & 15) : 8 * 15 + 4;
    const int32_t base = out.base[0][h] + 256 * out.base[1][h], step = out.step[0][h] + 256 * out.step[1][h];
    const float integer = static_cast<float>(a < 16 ? out.small[a] : base + ((256 * eighths * step + 16384) >> 15)) - p[a] * 16383.0f;
    if (!(integer < 1.0f && integer > -1.0f)) return false;
  }
  return true;
}

const Kernels& kernels_for(const Kernels& k, const float* code, bool fixed, Table& table) {
  table.top_word = 32767.0f;
  table.integers = false;
  if (k.byte_segments && find_segments(code, table.segments)) {
    const Kernels& segmented = table.segments.bytes ? *k.byte_segments : *k.wide_segments;
    segmented.prepare(code, fixed, table);
    table.integers = true;
    return segmented;
  }
  if (k.dynamic && find_dynamic(code, table.dynamic)) {
    k.dynamic->prepare(code, fixed, table);
    return *k.dynamic;
  }
  k.prepare(code, fixed, table);
  return k;
}

}  // namespace octavo

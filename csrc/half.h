// Conversions between float32 and the 16-bit types, one number at a time, with rounding to nearest even.
//
// Everything has internal linkage: translation units built for different instruction sets include this, and the linker
// must not merge their copies.
#pragma once
#include <cstdint>
#include <cstring>

namespace octavo {
namespace {

[[maybe_unused]] inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

[[maybe_unused]] inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

[[maybe_unused]] inline float from_bfloat16(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

[[maybe_unused]] inline uint16_t to_bfloat16(float x) {
  uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // keep NaN a NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31u) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0u) return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
  return float_of(sign | bits_of(magnitude));
}

[[maybe_unused]] inline uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (a < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the multiple of 2^-24 in the low mantissa bits, rounded by the addition itself.
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

// The smallest float16 that is at least x, for finite x >= 0; infinity above 65504.
[[maybe_unused]] inline uint16_t round_up_to_float16(float x) {
  const uint16_t h = to_float16(x);
  return static_cast<uint16_t>(from_float16(h) < x ? h + 1 : h);
}

}  // namespace
}  // namespace octavo

// Runs every operation of every instruction set this processor has, on many shapes, in guarded memory, against a plain loop.
// Prints "N passed, N failed" and exits with 1 on a difference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "guarded.h"
#include "half.h"
#include "kernels.h"
#include "ops.h"

using namespace octavo;

namespace {

int passed = 0, failed = 0;

void expect(bool ok, const char* what, const Kernels& k, const Matrix& m, DType type) {
  ok ? passed++ : failed++;
  if (!ok)
    std::printf("FAILED %s: %s, %lld x %lld, block %lld, type %d\n", what, k.name, static_cast<long long>(m.rows),
                static_cast<long long>(m.columns), static_cast<long long>(m.block), static_cast<int>(type));
}

float get(const void* data, DType type, int64_t i) {
  const char* p = static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(type));
  if (type == kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return type == kFloat16 ? from_float16(h) : from_bfloat16(h);
}

void put(void* data, DType type, int64_t i, float x) {
  char* p = static_cast<char*>(data) + i * static_cast<int64_t>(size_of(type));
  if (type == kFloat32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const uint16_t h = type == kFloat16 ? to_float16(x) : to_bfloat16(x);
  std::memcpy(p, &h, 2);
}

size_t bytes_of(DType type, int64_t count) { return size_of(type) * static_cast<size_t>(count); }

struct Case {
  int64_t rows, columns, block;
  bool half, at_end;
  DType type;
};

struct Random {
  std::mt19937 engine{7};
  float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine); }
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
};

// The dynamic map's value at index 127 + a: between two powers of two, the middles of equal parts of a decade.
float dynamic_value(int a) {
  if (a == 0 || a == 128) return a ? 1.0f : 0.0f;
  int k = 0;
  while (a >> (k + 1)) k++;
  const double part = 0.9 / (1 << k);
  return static_cast<float>((0.1 + part * (a - (1 << k) + 0.5)) * std::pow(10.0, k - 6));
}

// 256 free entries, or sixteen segments whose parts fit bytes, or do not, or the dynamic map (docs/FORMAT.md).
void put_code(void* code, Random& random) {
  const int64_t kind = random.whole(0, 3);
  if (kind == 3) {
    for (int i = 0; i < 256; i++) put(code, kFloat32, i, i < 127 ? -dynamic_value(127 - i) : dynamic_value(i - 127));
    return;
  }
  const int64_t scale = int64_t{1} << random.whole(11, 14), step = kind == 1 ? scale / 128 : 1;
  for (int i = 0; i < 256; i++) {
    const int64_t base = (i / 16 - 8) * (scale / 8) / step * step, slope = std::min<int64_t>(kind == 1 ? 127 : scale, scale / 8 / 15);
    const float free = static_cast<float>(i - 128) / 128.0f + (i == 200 ? 0.001f : 0.0f);
    put(code, kFloat32, i, kind ? static_cast<float>(base + slope * (i % 16)) / static_cast<float>(scale) : free);
  }
}

void run(const Kernels& k, const Case& c, Random& random) {
  const int64_t per_row = c.columns ? (c.columns - 1) / c.block + 1 : 0;
  const int64_t weights = c.rows * c.columns, scales = c.rows * per_row, tokens = random.whole(1, 6);
  const int threads = static_cast<int>(random.whole(1, 3));
  const DType scale_type = c.half ? kFloat16 : kFloat32;

  Guarded qdata(static_cast<size_t>(weights), c.at_end), absmax(bytes_of(scale_type, scales), c.at_end);
  Guarded code(1024, c.at_end), dense(bytes_of(c.type, weights), c.at_end);
  for (int64_t i = 0; i < weights; i++) qdata.as<uint8_t>()[i] = static_cast<uint8_t>(random.whole(0, 255));
  for (int64_t i = 0; i < scales; i++) put(absmax.as<void>(), scale_type, i, random.uniform(0.01f, 1.0f));
  put_code(code.as<void>(), random);
  const Matrix m{qdata.as<uint8_t>(), absmax.as<void>(), c.half, code.as<float>(), c.rows, c.columns, c.block};
  std::vector<float> exact(static_cast<size_t>(weights));
  for (int64_t i = 0; i < weights; i++)
    exact[static_cast<size_t>(i)] = get(m.code, kFloat32, m.qdata[i]) *
                                    get(m.absmax, scale_type, i / c.columns * per_row + i % c.columns / c.block);

  dequantize(k, m, 0, c.rows, 0, c.columns, dense.as<void>(), c.type, threads);
  Guarded one(4, true);
  bool same = true;
  for (int64_t i = 0; i < weights; i++) {
    put(one.as<void>(), c.type, 0, exact[static_cast<size_t>(i)]);
    same = same && get(one.as<void>(), c.type, 0) == get(dense.as<void>(), c.type, i);
  }
  expect(same, "dequantize", k, m, c.type);

  const double tolerance = c.type == kFloat32 ? 1e-5 : c.type == kFloat16 ? 2e-3 : 2e-2;
  Guarded x(bytes_of(c.type, tokens * c.columns), c.at_end), bias(bytes_of(c.type, c.rows), c.at_end);
  Guarded y(bytes_of(c.type, tokens * c.rows), c.at_end), z(bytes_of(c.type, tokens * c.columns), c.at_end);
  for (int64_t i = 0; i < tokens * c.columns; i++) put(x.as<void>(), c.type, i, random.uniform(-1, 1));
  for (int64_t i = 0; i < c.rows; i++) put(bias.as<void>(), c.type, i, random.uniform(-1, 1));
  linear(k, m, x.as<void>(), c.type, tokens, bias.as<void>(), c.type, y.as<void>(), threads);
  same = true;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t n = 0; n < c.rows; n++) {
      double sum = get(bias.as<void>(), c.type, n);
      for (int64_t i = 0; i < c.columns; i++)
        sum += static_cast<double>(get(x.as<void>(), c.type, t * c.columns + i)) *
               exact[static_cast<size_t>(n * c.columns + i)];
      same = same && std::fabs(sum - get(y.as<void>(), c.type, t * c.rows + n)) <=
                         tolerance * (1 + std::sqrt(static_cast<double>(c.columns)));
    }
  expect(same, "linear", k, m, c.type);

  // By tiles, or in bfloat16 by the instructions for it.
  for (const bool tiles : {false, true}) {
    if (!tiles && !(c.type == kBFloat16 && has_gemm(k, m))) continue;
    // More tokens than a tile, and once more than the sums kept at a time.
    const int64_t count = random.whole(0, 20) ? random.whole(1, 40) : 520;
    Guarded wide(bytes_of(c.type, count * c.columns), c.at_end), found(bytes_of(c.type, count * c.rows), c.at_end);
    for (int64_t i = 0; i < count * c.columns; i++) put(wide.as<void>(), c.type, i, random.uniform(-1, 1));
    if (!tiles) linear_gemm(k, m, wide.as<void>(), count, bias.as<void>(), c.type, found.as<void>(), threads);
    else if (!linear_tiles(k, m, wide.as<void>(), c.type, count, bias.as<void>(), c.type, found.as<void>(), threads)) break;
    same = true;
    for (int64_t t = 0; t < count; t++)
      for (int64_t n = 0; n < c.rows; n++) {
        double sum = get(bias.as<void>(), c.type, n);
        for (int64_t i = 0; i < c.columns; i++)
          sum += static_cast<double>(get(wide.as<void>(), c.type, t * c.columns + i)) *
                 exact[static_cast<size_t>(n * c.columns + i)];
        same = same && std::fabs(sum - get(found.as<void>(), c.type, t * c.rows + n)) <=
                           tolerance * (1 + std::sqrt(static_cast<double>(c.columns)));
      }
    expect(same, tiles ? "linear_tiles" : "linear_gemm", k, m, c.type);
  }

  for (const bool tiles : {false, true}) {
    if (!tiles) linear_transposed(k, m, y.as<void>(), c.type, tokens, z.as<void>(), threads);
    else if (!linear_transposed_tiles(k, m, y.as<void>(), c.type, tokens, z.as<void>(), threads)) break;
    same = true;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < c.columns; i++) {
        double sum = 0, size = 1;
        for (int64_t n = 0; n < c.rows; n++) {
          const double term = static_cast<double>(get(y.as<void>(), c.type, t * c.rows + n)) *
                              exact[static_cast<size_t>(n * c.columns + i)];
          sum += term;
          size += std::fabs(term);
        }
        same = same && std::fabs(sum - get(z.as<void>(), c.type, t * c.columns + i)) <= tolerance * size;
      }
    expect(same, tiles ? "linear_transposed_tiles" : "linear_transposed", k, m, c.type);
  }

  if (c.rows) {
    const int64_t count = random.whole(0, 5);
    Guarded ids(static_cast<size_t>(count) * 8, true), rows(bytes_of(c.type, count * c.columns), c.at_end);
    for (int64_t i = 0; i < count; i++) ids.as<int64_t>()[i] = random.whole(0, c.rows - 1);
    same = embedding(k, m, ids.as<int64_t>(), count, rows.as<void>(), c.type, threads) < 0;
    for (int64_t i = 0; i < count * c.columns; i++)
      same = same && get(rows.as<void>(), c.type, i) ==
                         get(dense.as<void>(), c.type, ids.as<int64_t>()[i / c.columns] * c.columns + i % c.columns);
    expect(same, "embedding", k, m, c.type);
  }

  Guarded codes(static_cast<size_t>(weights), c.at_end), found(bytes_of(scale_type, scales), c.at_end);
  const Weight weight{dense.as<void>(), c.type, c.rows, c.columns};
  same = quantize(k, weight, m.code, c.block, c.half, codes.as<uint8_t>(), found.as<void>(), threads);
  for (int64_t i = 0; i < weights; i++) {
    const float scale = get(found.as<void>(), scale_type, i / c.columns * per_row + i % c.columns / c.block);
    const float value = scale > 0 ? get(dense.as<void>(), c.type, i) / scale : 0.0f;
    int index = 0;
    for (int j = 0; j < 255; j++)
      index += (get(m.code, kFloat32, j) + get(m.code, kFloat32, j + 1)) * 0.5f < value;
    same = same && index == codes.as<uint8_t>()[i];
  }
  expect(same, "quantize", k, m, c.type);

  double error, power, expected = 0;
  squared_error(k, weight.data, c.type, m, &error, &power, threads);
  for (int64_t i = 0; i < weights; i++) {
    const double difference = static_cast<double>(get(dense.as<void>(), c.type, i)) - exact[static_cast<size_t>(i)];
    expected += difference * difference;
  }
  expect(std::fabs(error - expected) <= 1e-4 * expected + 1e-12, "squared_error", k, m, c.type);

  const int64_t bins = 257;
  Guarded counts(static_cast<size_t>(bins) * 8, true);
  float smallest, largest;
  same = histogram(k, weight, c.block, bins, c.half, counts.as<int64_t>(), threads) &&
         scale_range(k, weight, c.block, &smallest, &largest, threads) && smallest <= largest;
  expect(same, "histogram", k, m, c.type);
}

}  // namespace

int main() {
  const int64_t blocks[] = {1, 7, 16, 32, 48, 64, 100, 128, 4096, int64_t{1} << 40};
  for (const Kernels* const* k = supported_kernels(); *k; k++) {
    Random random;
    for (int i = 0; i < 240; i++) {
      Case c;
      c.rows = i % 8 == 0 ? random.whole(0, 1) : random.whole(1, 40);
      c.columns = i % 6 == 0 ? 64 * random.whole(1, 5) : i % 6 == 1 ? random.whole(0, 3) : random.whole(1, 330);
      c.block = blocks[random.whole(0, 9)];
      c.half = i % 2;
      c.at_end = random.whole(0, 3) > 0;
      c.type = static_cast<DType>(i % 3);
      run(**k, c, random);
    }
    // Large enough for several threads and several panels of columns.
    for (int type = 0; type < 3; type++) run(**k, {300, 1100, 64, true, true, static_cast<DType>(type)}, random);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

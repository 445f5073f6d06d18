// octavo._native: raw pointers in, nothing of PyTorch. octavo/ops/cpu/ checks shapes and calls this.
//
// Types are 0 float32, 1 float16, 2 bfloat16. Pointers are integers; 0 means absent. The GIL is released while it works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "segments.h"

namespace nb = nanobind;

namespace {

using Address = uintptr_t;

std::atomic<const octavo::Kernels*> active{nullptr};

const octavo::Kernels& kernels() {
  const octavo::Kernels* k = active.load(std::memory_order_relaxed);
  return k ? *k : *octavo::supported_kernels()[0];
}

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

octavo::DType type_of(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<octavo::DType>(type);
}

octavo::Matrix matrix(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns,
                      int64_t block) {
  return {at<const uint8_t>(qdata), at<const void>(absmax), half, at<const float>(code), rows, columns, block};
}

void linear(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns, int64_t block,
            Address x, int type, int64_t tokens, Address bias, int bias_type, Address out, int threads) {
  nb::gil_scoped_release released;
  octavo::linear(kernels(), matrix(qdata, absmax, half, code, rows, columns, block), at<const void>(x), type_of(type),
                 tokens, at<const void>(bias), type_of(bias_type), at<void>(out), threads);
}

// False, and nothing done, where the kernels do not have it for such a matrix.
bool linear_gemm(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns, int64_t block,
                 Address x, int type, int64_t tokens, Address bias, int bias_type, Address out, int threads) {
  nb::gil_scoped_release released;
  const octavo::Matrix m = matrix(qdata, absmax, half, code, rows, columns, block);
  const octavo::DType t = type_of(type);
  if (t != octavo::kBFloat16 || !octavo::has_gemm(kernels(), m))
    return octavo::linear_tiles(kernels(), m, at<const void>(x), t, tokens, at<const void>(bias), type_of(bias_type), at<void>(out),
                                threads);
  octavo::linear_gemm(kernels(), m, at<const void>(x), tokens, at<const void>(bias), type_of(bias_type), at<void>(out),
                      threads);
  return true;
}

bool linear_transposed_gemm(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns,
                            int64_t block, Address x, int type, int64_t tokens, Address out, int threads) {
  nb::gil_scoped_release released;
  return octavo::linear_transposed_tiles(kernels(), matrix(qdata, absmax, half, code, rows, columns, block), at<const void>(x),
                                         type_of(type), tokens, at<void>(out), threads);
}

void linear_transposed(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns,
                       int64_t block, Address x, int type, int64_t tokens, Address out, int threads) {
  nb::gil_scoped_release released;
  octavo::linear_transposed(kernels(), matrix(qdata, absmax, half, code, rows, columns, block), at<const void>(x),
                            type_of(type), tokens, at<void>(out), threads);
}

void dequantize(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns, int64_t block,
                int64_t row0, int64_t row1, int64_t col0, int64_t col1, Address out, int type, int threads) {
  if (row0 < 0 || row1 > rows || col0 < 0 || col1 > columns || col0 % octavo::kChunk)
    throw std::invalid_argument("dequantize: range outside the matrix, or not at a multiple of 64 columns");
  nb::gil_scoped_release released;
  octavo::dequantize(kernels(), matrix(qdata, absmax, half, code, rows, columns, block), row0, row1, col0, col1,
                     at<void>(out), type_of(type), threads);
}

int64_t embedding(Address qdata, Address absmax, bool half, Address code, int64_t rows, int64_t columns, int64_t block,
                  Address ids, int64_t count, Address out, int type, int threads) {
  nb::gil_scoped_release released;
  return octavo::embedding(kernels(), matrix(qdata, absmax, half, code, rows, columns, block), at<const int64_t>(ids),
                           count, at<void>(out), type_of(type), threads);
}

bool quantize(Address weight, int type, int64_t rows, int64_t columns, Address code, int64_t block, bool half,
              Address qdata, Address absmax, int threads) {
  nb::gil_scoped_release released;
  return octavo::quantize(kernels(), {at<const void>(weight), type_of(type), rows, columns}, at<const float>(code),
                          block, half, at<uint8_t>(qdata), at<void>(absmax), threads);
}

nb::object scale_range(Address weight, int type, int64_t rows, int64_t columns, int64_t block, int threads) {
  float smallest = 0.0f, largest = 0.0f;
  bool finite;
  {
    nb::gil_scoped_release released;
    finite = octavo::scale_range(kernels(), {at<const void>(weight), type_of(type), rows, columns}, block, &smallest,
                                 &largest, threads);
  }
  return finite ? nb::object(nb::make_tuple(smallest, largest)) : nb::none();
}

nb::tuple squared_error(Address weight, int type, Address qdata, Address absmax, bool half, Address code, int64_t rows,
                        int64_t columns, int64_t block, int threads) {
  double error = 0.0, power = 0.0;
  {
    nb::gil_scoped_release released;
    octavo::squared_error(kernels(), at<const void>(weight), type_of(type),
                          matrix(qdata, absmax, half, code, rows, columns, block), &error, &power, threads);
  }
  return nb::make_tuple(error, power);
}

bool histogram(Address weight, int type, int64_t rows, int64_t columns, int64_t block, int64_t bins, bool half,
               Address counts, int threads) {
  nb::gil_scoped_release released;
  return octavo::histogram(kernels(), {at<const void>(weight), type_of(type), rows, columns}, block, bins, half,
                           at<int64_t>(counts), threads);
}

int segments(Address code) {
  octavo::Segments found;
  return octavo::find_segments(at<const float>(code), found) ? found.bytes ? 1 : 2 : 0;
}

uint64_t read_through(Address data, int64_t bytes, int threads) {
  nb::gil_scoped_release released;
  return octavo::read_through(at<const void>(data), bytes, threads);
}

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const octavo::Kernels* const* k = octavo::supported_kernels(); *k; k++) names.emplace_back((*k)->name);
  return names;
}

void choose(const std::string& name) {
  const octavo::Kernels* k = octavo::find_kernels(name.c_str());
  if (!k) throw std::invalid_argument("kernels '" + name + "' are unknown or not supported by this processor");
  active.store(k);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Octavo's CPU kernels on raw pointers; use octavo.ops.";
  m.def("linear", &linear);
  m.def("linear_gemm", &linear_gemm);
  m.def("linear_transposed", &linear_transposed);
  m.def("linear_transposed_gemm", &linear_transposed_gemm);
  m.def("dequantize", &dequantize);
  m.def("embedding", &embedding);
  m.def("quantize", &quantize);
  m.def("scale_range", &scale_range);
  m.def("squared_error", &squared_error);
  m.def("histogram", &histogram);
  m.def("segments", &segments, "What a codebook consists of: 0 free entries, 1 segments whose parts fit bytes, 2 other segments.");
  m.def("read_through", &read_through, "Read memory, to measure its bandwidth.");
  m.def("supported", &supported, "Names of the kernels this processor can run, best first.");
  m.def("select", &choose, "Use the kernels of that name from now on.");
  m.def("active", [] { return std::string(kernels().name); });
  m.def("cpu_features", [] { return std::string(octavo::cpu_features()); });
  m.def("share_openmp_of", &octavo::share_openmp_of, "Use the OpenMP runtime that this loaded library is bound to.");
  m.def("pool", [] { return std::string(octavo::pool()); });
  m.def("asked_openmp", &octavo::asked_openmp);
}

// Recognising a codebook that can be computed, from its 256 values (docs/FORMAT.md): sixteen straight segments, or the dynamic map.
#pragma once
#include "types.h"

namespace octavo {

// Fills `out` if the code consists of segments. `code` may be misaligned.
bool find_segments(const float* code, Segments& out);

// Fills `out` if both forms of it give every value of the code within a rounding.
bool find_dynamic(const float* code, Dynamic& out);

// The kernels for a codebook: those that compute it where there are such, else `k`; and its table for them, for exact float32 or for
// fixed point.
const Kernels& kernels_for(const Kernels& k, const float* code, bool fixed, Table& table);

}  // namespace octavo

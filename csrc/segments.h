// Recognising a codebook of sixteen straight segments from its 256 values (docs/FORMAT.md).
#pragma once
#include "types.h"

namespace octavo {

// Fills `out` if the code consists of segments. `code` may be misaligned.
bool find_segments(const float* code, Segments& out);

// The kernels for a codebook: those that compute it where it consists of segments, else `k`; and its table for them, for exact
// float32 or for fixed point.
const Kernels& kernels_for(const Kernels& k, const float* code, bool fixed, Table& table);

}  // namespace octavo

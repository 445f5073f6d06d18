// The kernels of each instruction set, and the choice among them at run time.
#pragma once
#include "types.h"

namespace octavo {

const Kernels& portable_kernels();
#if defined(OCTAVO_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vbmi_kernels();
const Kernels& vbmi_bf16_kernels();
#elif defined(OCTAVO_NEON)
const Kernels& neon_kernels();
#endif

// What this processor and its operating system can run, best first; ends with null.
const Kernels* const* supported_kernels();

// The kernels by name, or null if unknown or not supported here.
const Kernels* find_kernels(const char* name);

// The features that decide, in words ("avx512_vbmi, avx512_vnni, ...").
const char* cpu_features();

}  // namespace octavo

// The kernels of vbmi.cpp built with AVX512_BF16 (AMD Zen 4 and later, Intel Sapphire Rapids and later).
#define OCTAVO_BF16
#include "vbmi.cpp"

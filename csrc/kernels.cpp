#include "kernels.h"

#include <cstring>

#if defined(OCTAVO_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace octavo {
namespace {

#if defined(OCTAVO_X86)
struct Features {
  bool avx2 = false, avx512 = false, vbmi = false, bf16 = false, amx = false;
  char words[160] = "";

  Features() {
    const unsigned highest = leaf(0, 0).a;
    const Registers one = leaf(1, 0);
    const bool fma = one.c >> 12 & 1, f16c = one.c >> 29 & 1, os_saves = one.c >> 27 & 1;
    if (highest < 7 || !os_saves) return;
    // The operating system must save the registers: XCR0 bits 1-2 for AVX, 5-7 for AVX-512, 17-18
    // for tiles.
    const unsigned saved = saved_state();
    const Registers seven = leaf(7, 0);
    avx2 = (saved & 6u) == 6u && (seven.b >> 5 & 1) && fma && f16c;
    const bool f = seven.b >> 16 & 1, dq = seven.b >> 17 & 1, bw = seven.b >> 30 & 1, vl = seven.b >> 31 & 1;
    avx512 = avx2 && (saved & 0xe6u) == 0xe6u && f && dq && bw && vl;
    vbmi = avx512 && (seven.c >> 1 & 1) && (seven.c >> 11 & 1);
    bf16 = vbmi && (leaf(7, 1).a >> 5 & 1);
    amx = bf16 && (saved & 0x60000u) == 0x60000u && (seven.d >> 22 & 1);
    add(avx2, "avx2, fma, f16c");
    add(avx512, "avx512f, avx512bw, avx512dq, avx512vl");
    add(vbmi, "avx512_vbmi, avx512_vnni");
    add(bf16, "avx512_bf16");
    add(amx, "amx_bf16");
  }

 private:
  struct Registers {
    unsigned a, b, c, d;
  };
  static Registers leaf(unsigned number, unsigned sub) {
    Registers r{};
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(number), static_cast<int>(sub));
    std::memcpy(&r, out, sizeof r);
#else
    __cpuid_count(number, sub, r.a, r.b, r.c, r.d);
#endif
    return r;
  }
  static unsigned saved_state() {
#if defined(_MSC_VER)
    return static_cast<unsigned>(_xgetbv(0));
#else
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
  }
  void add(bool there, const char* names) {
    if (!there) return;
    if (words[0]) std::strncat(words, ", ", sizeof words - std::strlen(words) - 1);
    std::strncat(words, names, sizeof words - std::strlen(words) - 1);
  }
};

const Features& features() {
  static const Features found;
  return found;
}
#endif

struct Supported {
  const Kernels* list[16] = {};  // far more than there are; a null ends them
  Supported() {
    int n = 0;
#if defined(OCTAVO_X86)
    if (features().bf16) list[n++] = &vbmi_bf16_kernels();
    if (features().vbmi) list[n++] = &vbmi_kernels();
    if (features().avx512) list[n++] = &avx512_kernels();
    if (features().avx2) list[n++] = &avx2_kernels();
#elif defined(OCTAVO_NEON)
    list[n++] = &neon_kernels();  // every 64-bit ARM has it
#endif
    list[n++] = &portable_kernels();
  }
};

}  // namespace

const Kernels* const* supported_kernels() {
  static const Supported supported;
  return supported.list;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = supported_kernels(); *k; k++)
    if (std::strcmp((*k)->name, name) == 0) return *k;
  return nullptr;
}

const char* cpu_features() {
#if defined(OCTAVO_X86)
  return features().words;
#elif defined(OCTAVO_NEON)
  return "neon";
#else
  return "";
#endif
}

}  // namespace octavo

// Which instruction set the CPU ops use, decided once at run time.
//
// A file *_avx2.cpp or *_avx512.cpp is compiled with that instruction set (setup.py adds the flags on x86-64; elsewhere
// the file compiles to nothing). Such a file must not instantiate anything with external inline linkage (no std::
// templates): the linker keeps one copy of those, and it may keep the one with AVX in it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define MMEBM_X86 1
#endif

namespace mmebm {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

inline Isa best_isa() {
#if defined(MMEBM_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::avx2;
  }
#endif
  return Isa::generic;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
}

}  // namespace mmebm

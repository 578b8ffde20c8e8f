// Which instruction set the CPU ops use, decided once at run time.
//
// A file cpu_kernel.cpp is compiled once per instruction set (setup.py names it MMEBM_ISA and adds the flags). Such a
// file must not instantiate anything with external inline linkage (no std:: templates): the linker keeps one copy of those,
// and it may keep the one with AVX in it.
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

// A table of loops of each instruction set, `name_generic` and so on, and name(isa) to choose one. A kernel file
// defines its own as `const Table MMEBM_LOOPS(name) = {...}`.
#if defined(MMEBM_X86)
#define MMEBM_DECLARE_LOOPS(Table, name)                                                         \
  extern const Table name##_generic, name##_avx2, name##_avx512;                                 \
  inline const Table& name(Isa isa) {                                                            \
    return isa == Isa::avx512 ? name##_avx512 : isa == Isa::avx2 ? name##_avx2 : name##_generic; \
  }
#else
#define MMEBM_DECLARE_LOOPS(Table, name) \
  extern const Table name##_generic;     \
  inline const Table& name(Isa) { return name##_generic; }
#endif
#define MMEBM_JOIN(name, isa) name##_##isa
#define MMEBM_JOIN_EXPANDED(name, isa) MMEBM_JOIN(name, isa)
#define MMEBM_LOOPS(name) MMEBM_JOIN_EXPANDED(name, MMEBM_ISA)

}  // namespace mmebm

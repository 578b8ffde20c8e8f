#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS dynamics_loops_avx512
#include "dynamics_kernel.h"
#endif

#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS step_loops_avx512
#include "langevin_step_kernel.h"
#endif

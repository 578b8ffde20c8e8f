#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS residual_loops_avx512
#include "residual_kernel.h"
#endif

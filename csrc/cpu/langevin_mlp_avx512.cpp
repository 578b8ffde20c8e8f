#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS mlp_loops_avx512
#include "langevin_mlp_kernel.h"
#endif

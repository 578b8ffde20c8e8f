#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS dynamics_loops_avx2
#include "dynamics_kernel.h"
#endif

#include "isa.h"
#if defined(MMEBM_X86)
#define MMEBM_LOOPS noise_loops_avx2
#include "noise_loops.h"
#endif

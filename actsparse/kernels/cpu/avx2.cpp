#if defined(__x86_64__)
#define LANES 8
#define TABLE avx2_kernels
#define NAME "avx2"
#include "kernels.inc"
#endif

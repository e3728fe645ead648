#if defined(__x86_64__)
#define LANES 16
#define TABLE avx512_kernels
#define NAME "avx512"
#include "kernels.inc"
#endif

#define LANES 4
#define TABLE baseline_kernels
#define NAME "baseline"
#include "kernels.inc"

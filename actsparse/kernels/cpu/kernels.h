// What the torch binding asks of the vector kernels. One table for each instruction set; each is
// compiled with flags of its own, so that file may include nothing whose inline functions the
// linker could pick for another table: no C++ standard library beyond <cstdint>.
#pragma once
#include <cstdint>

namespace actsparse {

constexpr int64_t kWord = 64;     // units a mask word covers
constexpr int64_t kGroup = 16;    // units that share a vector of int8 codes
constexpr int64_t kPanel = 4;     // channels of one unit that lie together there
enum Activation : int64_t { kReLU = 0, kJSReLU = 1, kSquaredReLU = 2 };

// Blocked CSR: entries of segment (row, block) are [pointer[row * blocks + block], ...+ 1).
struct Entries {
  const int64_t* pointer;
  const int32_t* index;
  int64_t blocks;
};

struct Range {
  int64_t begin, end;
};

// int8 copy of a matrix [rows, D] in the order the screen reads it, with what the bound needs.
struct Codes {
  const int8_t* codes;    // [groups, channels / kPanel, kGroup, kPanel]
  const int32_t* shift;   // [units] −128·Σ codes: x's codes are stored + 128
  const float* scale;     // [units]
  const float* error;     // [units] ‖u − û‖ + γ‖û‖, rounded up: what ‖x‖ is multiplied by
  const float* norm;      // [units] ‖û‖(1 + γ), rounded up: what ‖x − x̂‖ is multiplied by
  const float* bias;      // [units] b − floor + γ(|b| + floor) + what underflow can lose
  int64_t groups, channels;
};

struct Tokens {
  const uint8_t* codes;  // [tokens * planes, channels], + 128
  const float* scale;    // [tokens]
  const float* norm;     // [tokens] ‖x‖
  const float* error;    // [tokens] ‖x − x̂‖
  int planes;            // 1: 8 bits; 2: 16 bits, high and low byte in two rows
};

struct Kernels {
  const char* name;
  // words[w] bit h: z + bias is not <= floor (NaN counts as active)
  void (*mask)(const float* z, const float* bias, int64_t units, float floor, uint64_t* words);
  // out[r] = bias + Σ_k value[k] · rows[index[k]] over columns; exact zeros are skipped
  void (*multiply)(Entries a, const float* value, const float* rows, int64_t d, const float* bias,
                   float* out, Range r, Range columns, bool cold);
  // value[k] = ⟨left[r], rows[index[k]]⟩
  void (*sample)(Entries a, const float* left, const float* rows, int64_t d, float* value, Range r,
                 Range blocks, bool cold);
  // mask words of units that may be active, for tokens t and groups g
  void (*screen)(Codes u, Tokens x, Range t, Range g, int64_t words, uint64_t* mask);
  // codes (+ offset), and scale, ‖row‖, ‖row − codes·scale‖ rounded up
  void (*quantise)(const float* row, int64_t d, int planes, int offset, uint8_t* codes,
                   int64_t stride, float* stats);
  // out[c * rows + r] = in[r * stride + c]
  void (*transpose)(const float* in, int64_t stride, int64_t rows, int64_t columns, float* out);
  // whether no entry of p is below the one before
  bool (*rises)(const int64_t* p, int64_t n);
  // whether all of index lie in [0, limit)
  bool (*below)(const int32_t* index, int64_t n, int64_t limit);
};

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

}  // namespace actsparse

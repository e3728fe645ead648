// What the torch binding asks of the vector kernels. One table for each instruction set; each is
// compiled with flags of its own, so that file may include nothing whose inline functions the
// linker could pick for another table: no C++ standard library beyond <cstdint>.
#pragma once
#include <cstdint>

namespace actsparse {

struct bf16 {
  uint16_t bits;
};

static inline float wide(float v) { return v; }
static inline float wide(bf16 v) {
  const uint32_t u = (uint32_t)v.bits << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline void put(float v, float* out) { *out = v; }
static inline void put(float v, bf16* out) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  out->bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

constexpr int64_t kWord = 64;     // units a mask word covers
constexpr int64_t kGroup = 16;    // units that share a vector of int8 codes
constexpr int64_t kFour = 4;      // channels of one unit that lie together there
enum Activation : int64_t { kReLU = 0, kJSReLU = 1, kSquaredReLU = 2 };

// A matrix in panels of 256 bytes of columns, [panels, rows, 256 bytes], the last filled with 0:
// one panel of all rows stays in the second-level cache while entries gather from it.
template <class E>
constexpr int64_t kPanel = 256 / (int64_t)sizeof(E);

// Blocked CSR: entries of segment (row, block) are [pointer[row * blocks + block], ...+ 1).
struct Entries {
  const int64_t* pointer;
  const int32_t* index;
  int64_t blocks;
};

struct Range {
  int64_t begin, end;
};

// Where the sums of a segment lie that begins with entry k: at a multiple of 8, so that no store
// overlaps the next segment's load.
inline int64_t aligned_place(int64_t k, int64_t segment) { return (k & ~7) + 8 * segment; }

// int8 copy of a matrix [rows, D] in the order the screen reads it, with what the bound needs.
struct Codes {
  const int8_t* codes;    // [groups, channels / kFour, kGroup, kFour]
  const int32_t* shift;   // [units] −128·Σ codes: x's codes are stored + 128
  const float* scale;     // [units]
  const float* error;     // [units] ‖u − û‖ + γ‖û‖, rounded up: what ‖x‖ is multiplied by
  const float* step;      // [units] max |u − û| + γ max |û|, rounded up
  const float* norm;      // [units] ‖û‖(1 + γ), rounded up: what ‖x − x̂‖ is multiplied by
  const float* bias;      // [units] b − floor + γ(|b| + floor) + what underflow can lose
  int64_t groups, channels;
};

struct Tokens {
  const uint8_t* codes;  // [tokens * planes, channels], + 128
  const float* scale;    // [tokens]
  const float* norm;     // [tokens] ‖x‖
  const float* rest;     // [tokens] ‖x‖ without its large entries
  const float* large;    // [tokens] Σ |x| of these
  const float* error;    // [tokens] ‖x − x̂‖
  int planes;            // 1: 8 bits; 2: 16 bits, high and low byte in two rows
};

// The kernels whose operands are of dtype E. Sums are float32.
template <class E>
struct Products {
  // out[r] = bias + Σ_k value[k] · panel[index[k]] over one panel, of which `columns` are there,
  // into the rows from `out` on;
  // blocks: those of each row that count. `carry` [r, kPanel] holds float sums between calls for
  // further blocks, the first of which `begins` and the last `ends`. `ahead`: fetch rows early.
  void (*multiply)(Entries a, Range r, Range blocks, const E* value, const E* panel,
                   const float* bias, float* carry, bool begins, bool ends, E* out, int64_t stride,
                   int64_t columns, bool ahead);
  // z of segment (r, `to`) (+)= ⟨left[r], panel[index[k]]⟩, at aligned_place of r * of + to
  void (*sample)(Entries a, Range r, Range blocks, int64_t of, int64_t to, const E* left,
                 int64_t stride, const E* panel, float* z, bool first);
  // value[k] = ⟨left[r], rows[index[k]]⟩ of whole rows that come from memory
  void (*dots)(Entries a, Range r, Range blocks, const E* left, const E* rows, int64_t d,
               float* value);
  // words[w] bit h: z is not <= floor (NaN counts as active); with `limits`, |z| not <= limits[h]
  void (*mask)(const E* z, int64_t units, float floor, const float* limits, uint64_t* words);
  // out[h] = z[h], or 0 where |z[h]| <= limits[h]
  void (*cut)(const E* z, int64_t units, const float* limits, E* out);
  // units and values z + bias, rounded to E, of the n sums whose value is not <= floor; returns how
  // many, and may write up to 16 more
  int64_t (*keep)(const float* z, const int32_t* index, int64_t n, const float* bias, float floor,
                  int32_t* kept, E* value);
  // out[c * to + r] = in[r * stride + c]
  void (*transpose)(const E* in, int64_t stride, int64_t rows, int64_t columns, E* out, int64_t to);
  // n entries of in as floats
  void (*widen)(const E* in, int64_t n, float* out);
  void (*narrow)(const float* in, int64_t n, E* out);
};

struct Kernels {
  const char* name;
  Products<float> f32;
  Products<bf16> b16;
  // mask words of units that may be active, for tokens t and groups g
  void (*screen)(Codes u, Tokens x, Range t, Range g, int64_t words, uint64_t* mask);
  // units of the set bits, from `first` on; writes up to 16 more
  int64_t (*list)(const uint64_t* mask, int64_t words, int64_t first, int32_t* index);
  // codes (+ offset), and scale, ‖row‖, ‖row − codes·scale‖, ‖row‖ without its large entries and
  // their Σ |·|, rounded up
  void (*quantise)(const float* row, int64_t d, int planes, int offset, uint8_t* codes,
                   int64_t stride, float* stats);
  // whether no entry of p is below the one before
  bool (*rises)(const int64_t* p, int64_t n);
  // whether all of index lie in [0, limit)
  bool (*below)(const int32_t* index, int64_t n, int64_t limit);
};

template <class E>
const Products<E>& products_of(const Kernels* k);
template <>
inline const Products<float>& products_of(const Kernels* k) { return k->f32; }
template <>
inline const Products<bf16>& products_of(const Kernels* k) { return k->b16; }

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, avx512bf16_kernels;

}  // namespace actsparse

// Entries that are not zero: packed, multiplied, sampled, and sorted by unit.
#pragma once
#include <cmath>

#include "tensors.h"

namespace actsparse {
namespace {

// ---- packing --------------------------------------------------------------------------------

struct Packed {
  Tensor pointer, index, value, slope;
};

int64_t blocks_of(int64_t columns) { return columns ? ceil_div(columns, kBlock) : 1; }

struct Shape {
  int64_t tokens, units;
  int64_t blocks() const { return blocks_of(units); }
  int64_t words() const { return ceil_div(units, kWord); }
  int64_t segments() const { return tokens * blocks(); }
};

constexpr int64_t kSmall = 32;  // rows whose bits and entries are not worth a second thread

void running_total(int64_t* pointer, int64_t segments) {
  pointer[0] = 0;
  for (int64_t i = 0; i < segments; i++) pointer[i + 1] += pointer[i];
}

// Pointer and index of the set bits of mask [tokens, words].
int32_t* bits_of(const uint64_t* mask, Shape s, int64_t* pointer, Tensor& index) {
  const int64_t per = kBlock / kWord, blocks = s.blocks(), words = s.words();
  split(s.tokens, [&](int64_t a, int64_t b) {
    for (int64_t t = a; t < b; t++)
      for (int64_t k = 0; k < blocks; k++) {
        int64_t n = 0;
        for (int64_t w = k * per; w < (k + 1) * per && w < words; w++)
          n += __builtin_popcountll(mask[t * words + w]);
        pointer[t * blocks + k + 1] = n;
      }
  }, kSmall);
  running_total(pointer, s.segments());
  index = empty<int32_t>(pointer[s.segments()]);
  int32_t* out = data<int32_t>(index);
  split(s.tokens, [&](int64_t a, int64_t b) {
    int32_t* o = out + pointer[a * blocks];
    for (int64_t t = a; t < b; t++)
      for (int64_t w = 0; w < words; w++)
        for (uint64_t m = mask[t * words + w]; m; m &= m - 1)
          *o++ = static_cast<int32_t>(w * kWord + __builtin_ctzll(m));
  }, kSmall);
  return out;
}

// z → φ(z) in place, and φ′(z) where that is not simply one.
Tensor activate(Tensor& z, int64_t n, int64_t act) {
  Tensor slope = empty<float>(act == kReLU ? 0 : n);
  float* v = data<float>(z);
  float* s = data<float>(slope);
  if (act == kJSReLU)
    split(n, [=](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; k++) s[k] = v[k] + 1.f, v[k] += 0.5f * v[k] * v[k];
    }, 64 * kSmall);
  if (act == kSquaredReLU)
    split(n, [=](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; k++) s[k] = 2.f * v[k], v[k] *= v[k];
    }, 64 * kSmall);
  return slope;
}

// The entries of φ(z + bias); z is contiguous [s.tokens, s.units].
Packed pack_dense(const Tensor& z, const Maybe& bias, Shape s, Phi phi) {
  require("bias", bias, s.units);
  const float *in = data<float>(z), *b = data<float>(bias);
  const auto mask = scratch<uint64_t>(s.tokens * s.words());
  split(s.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      kernels()->mask(in + t * s.units, b, s.units, phi.floor, &mask[t * s.words()]);
  }, kSmall);
  Packed p{empty<int64_t>(s.segments() + 1), Tensor(), Tensor(), Tensor()};
  int64_t* pointer = data<int64_t>(p.pointer);
  const int32_t* index = bits_of(mask.get(), s, pointer, p.index);
  p.value = empty<float>(pointer[s.segments()]);
  float* value = data<float>(p.value);
  split(s.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t k = pointer[t * s.blocks()]; k < pointer[(t + 1) * s.blocks()]; k++)
        value[k] = in[t * s.units + index[k]] + (b ? b[index[k]] : 0.f);
  }, kSmall);
  p.slope = activate(p.value, pointer[s.segments()], phi.act);
  return p;
}

// ---- products -------------------------------------------------------------------------------

bool few(int64_t rows) { return rows < 4 * threads(); }

void multiply_into(Entries a, const float* value, const float* rows, int64_t n, int64_t d,
                   const float* bias, float* out) {
  const bool cold = n <= 8;
  if (few(n))
    split(d, [&](int64_t c, int64_t e) {
      kernels()->multiply(a, value, rows, d, bias, out, {0, n}, {c, e}, cold);
    }, 64);
  else
    split(n, [&](int64_t r, int64_t e) {
      kernels()->multiply(a, value, rows, d, bias, out, {r, e}, {0, d}, cold);
    });
}

void sample_into(Entries a, const float* left, const float* rows, int64_t n, int64_t d,
                 float* value) {
  const bool cold = n <= 8;
  if (few(n))
    split(a.blocks, [&](int64_t b, int64_t e) {
      kernels()->sample(a, left, rows, d, value, {0, n}, {b, e}, cold);
    });
  else
    split(n, [&](int64_t r, int64_t e) {
      kernels()->sample(a, left, rows, d, value, {r, e}, {0, a.blocks}, cold);
    });
}

// ---- entries that are handed in -------------------------------------------------------------

// Whether f(begin, end) holds for all pieces of [0, n).
template <class F>
bool everywhere(int64_t n, F f) {
  std::atomic<bool> all{true};
  split(n, [&](int64_t a, int64_t b) {
    if (!f(a, b)) all.store(false, std::memory_order_relaxed);
  }, 1 << 14);
  return all;
}

// pointer rises from 0 to the number of entries, in whole rows. Returns the blocks of a row.
int64_t check_pointer(const Tensor& pointer, int64_t n, int64_t blocks, int64_t entries) {
  const int64_t segments = blocks < 0 ? -1 : n * blocks;
  require<int64_t>("pointer", pointer, {segments < 0 ? -1 : segments + 1});
  const int64_t last = pointer.numel() - 1;
  if (segments < 0) {
    blocks = n ? last / n : 0;
    if (last != n * blocks || (n && !blocks))
      refuse("pointer must have 1 more entry than " + std::to_string(n) +
             " rows have blocks; it has " + std::to_string(last + 1));
  }
  const int64_t* p = data<int64_t>(pointer);
  if (p[0] != 0 || p[last] != entries || !everywhere(last, [=](int64_t a, int64_t b) {
        return kernels()->rises(p + a, b - a + 1);
      }))
    refuse("pointer must rise from 0 to the number of entries, " + std::to_string(entries));
  return blocks;
}

// Rows of values: entries whose columns do not matter.
Entries rows_of(const Tensor& pointer, const Tensor& value, int64_t n) {
  require("value", value, {-1});
  const int64_t blocks = check_pointer(pointer, count("n", n), -1, value.numel());
  return {data<int64_t>(pointer), nullptr, blocks};
}

// The entries of a matrix [n, columns].
Entries entries_of(const Tensor& pointer, const Tensor& index, int64_t n, int64_t columns) {
  require<int32_t>("index", index, {-1});
  const int64_t nnz = index.numel();
  const int64_t blocks = check_pointer(pointer, count("n", n), blocks_of(columns), nnz);
  const int32_t* i = data<int32_t>(index);
  if (!everywhere(nnz, [=](int64_t a, int64_t b) {
        return kernels()->below(i + a, b - a, columns);
      }))
    refuse("index must be at least 0 and below " + std::to_string(columns));
  return {data<int64_t>(pointer), i, blocks};
}

Tensor multiply(const Tensor& pointer, const Tensor& index, const Tensor& value, const Tensor& rows,
                const Maybe& bias, int64_t n, bool turned) {
  const auto [units, d] = sizes_of("rows", rows);
  const Entries a = entries_of(pointer, index, n, units);
  require("bias", bias, d);
  require("value", value, {index.numel()});
  const Rows by_row("rows", rows, units, d);
  const auto into = [&, d = d](float* out) {
    multiply_into(a, data<float>(value), by_row.data, n, d, data<float>(bias), out);
  };
  if (!turned) {
    Tensor out = empty<float>(n, d);
    into(data<float>(out));
    return out;
  }
  Tensor out = empty<float>(d, n);
  const auto product = scratch<float>(n * d);
  into(product.get());
  turn(product.get(), n, d, data<float>(out));
  return out;
}

Tensor sample(const Tensor& pointer, const Tensor& index, const Tensor& x, const Tensor& up,
              const Maybe& bias) {
  const auto [units, d] = sizes_of("up", up);
  const int64_t n = sizes_of("x", x).rows;
  const Entries a = entries_of(pointer, index, n, units);
  require("x", x, {n, d});
  require("bias", bias, units);
  const Rows by_row("up", up, units, d);
  Tensor value = empty<float>(index.numel());
  float* v = data<float>(value);
  sample_into(a, data<float>(x), by_row.data, n, d, v);
  if (bias)
    split(index.numel(), [=, b = data<float>(bias)](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; k++) v[k] += b[a.index[k]];
    }, 64 * kSmall);
  return value;
}

// The same entries by unit: counting sort, in chunks of tokens, each on its own.
std::tuple<Tensor, Tensor, Tensor> by_unit(const Tensor& pointer, const Tensor& index,
                                           const Tensor& value, int64_t tokens, int64_t units) {
  constexpr int64_t chunk = 128, per_block = kBlock / chunk;
  const Entries a = entries_of(pointer, index, tokens, count("units", units));
  const int64_t blocks = blocks_of(tokens), chunks = ceil_div(tokens, chunk), n = index.numel();
  require("value", value, {n});
  Tensor out_pointer = empty<int64_t>(units * blocks + 1);
  Tensor token = empty<int32_t>(n), sorted = empty<float>(n);
  int64_t* p = data<int64_t>(out_pointer);
  const float* v = data<float>(value);
  int32_t* row = data<int32_t>(token);
  float* o = data<float>(sorted);
  const auto next = scratch<int64_t>(chunks * units);  // counts, then where the next entry goes
  const auto each = [&](auto visit) {
    split(chunks, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; c++)
        for (int64_t t = c * chunk; t < (c + 1) * chunk && t < tokens; t++)
          for (int64_t k = a.pointer[t * a.blocks]; k < a.pointer[(t + 1) * a.blocks]; k++)
            visit(t, k, next[c * units + a.index[k]]);
    });
  };
  split(chunks, [&](int64_t from, int64_t to) {
    for (int64_t i = from * units; i < to * units; i++) next[i] = 0;
  });
  each([](int64_t, int64_t, int64_t& count) { count++; });
  int64_t total = 0;
  for (int64_t h = 0; h < units; h++) {
    if (!chunks) p[h] = 0;
    for (int64_t c = 0; c < chunks; c++) {
      if (c % per_block == 0) p[h * blocks + c / per_block] = total;
      const int64_t count = next[c * units + h];
      next[c * units + h] = total;
      total += count;
    }
  }
  p[units * blocks] = total;
  each([&](int64_t t, int64_t k, int64_t& to) {
    row[to] = static_cast<int32_t>(t);
    o[to++] = v[k];
  });
  return {out_pointer, token, sorted};
}

// Σ of each row's entries.
Tensor row_sums(const Tensor& pointer, const Tensor& value, int64_t n) {
  const auto [p, _, blocks] = rows_of(pointer, value, n);
  Tensor out = empty<float>(n);
  float* o = data<float>(out);
  const float* v = data<float>(value);
  for (int64_t h = 0; h < n; h++) {
    double sum = 0;
    for (int64_t k = p[h * blocks]; k < p[(h + 1) * blocks]; k++) sum += v[k];
    o[h] = static_cast<float>(sum);
  }
  return out;
}

// Σ|v| and √Σv² of each row's entries.
std::tuple<Tensor, Tensor> row_norms(const Tensor& pointer, const Tensor& value, int64_t n) {
  const Entries e = rows_of(pointer, value, n);
  Tensor one = empty<float>(n), two = empty<float>(n);
  float *o = data<float>(one), *t = data<float>(two);
  const float* v = data<float>(value);
  split(n, [=, p = e.pointer, blocks = e.blocks](int64_t a, int64_t b) {
    for (int64_t r = a; r < b; r++) {
      double sum = 0, squares = 0;
      for (int64_t k = p[r * blocks]; k < p[(r + 1) * blocks]; k++) {
        sum += std::fabs(v[k]);
        squares += (double)v[k] * v[k];
      }
      o[r] = static_cast<float>(sum), t[r] = static_cast<float>(std::sqrt(squares));
    }
  }, kSmall);
  return {one, two};
}

// Gradients of entries, given those of their rows' norms; of a zero it is 0.
Tensor row_norms_backward(const Tensor& pointer, const Tensor& value, const Tensor& two,
                          const Tensor& grad_one, const Tensor& grad_two) {
  const int64_t n = two.numel();
  const Entries e = rows_of(pointer, value, n);
  require("two", two, {n});
  require("grad_one", grad_one, {n});
  require("grad_two", grad_two, {n});
  Tensor out = empty<float>(value.numel());
  float* o = data<float>(out);
  const float *v = data<float>(value), *norm = data<float>(two);
  const float *first = data<float>(grad_one), *second = data<float>(grad_two);
  split(n, [=, p = e.pointer, blocks = e.blocks](int64_t a, int64_t b) {
    for (int64_t r = a; r < b; r++) {
      const float g = first[r], s = norm[r] == 0.f ? second[r] : second[r] / norm[r];
      for (int64_t k = p[r * blocks]; k < p[(r + 1) * blocks]; k++)
        o[k] = (v[k] > 0.f ? g : v[k] < 0.f ? -g : 0.f) + s * v[k];
    }
  }, kSmall);
  return out;
}

Tensor turned(const Tensor& matrix) {
  const auto [rows, columns] = sizes_of("matrix", matrix);
  require("matrix", matrix, {rows, columns});
  Tensor out = empty<float>(columns, rows);
  turn(data<float>(matrix), rows, columns, data<float>(out));
  return out;
}

}  // namespace
}  // namespace actsparse

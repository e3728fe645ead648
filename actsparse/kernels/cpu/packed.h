// Entries that are not zero: packed, checked where they are handed in, and sorted by unit.
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
void bits_of(const uint64_t* mask, Shape s, int64_t* pointer, Tensor& index) {
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
  const int64_t n = pointer[s.segments()];
  index = empty<int32_t>({n});
  int32_t* out = data<int32_t>(index);
  split(s.tokens, [&](int64_t a, int64_t b) {
    const auto units = scratch<int32_t>(s.units + 16);
    for (int64_t t = a; t < b; t++) {
      const int64_t found = kernels()->list(mask + t * words, words, 0, units.get());
      std::copy_n(units.get(), found, out + pointer[t * blocks]);
    }
  }, kSmall);
}

// φ(z) and, where that is not simply 1, φ′(z) of n entries, in z's place.
template <class E>
Tensor activate(E* z, int64_t n, int64_t act) {
  Tensor slope = empty<E>({act == kReLU ? 0 : n});
  if (act == kReLU) return slope;
  E* out = data<E>(slope);
  split(n, [=](int64_t a, int64_t b) {
    float v[256], d[256];
    for (int64_t k = a; k < b; k += 256) {
      const int64_t m = std::min<int64_t>(256, b - k);
      by<E>().widen(z + k, m, v);
      for (int64_t i = 0; i < m; i++) {
        d[i] = act == kJSReLU ? v[i] + 1.f : 2.f * v[i];
        v[i] = act == kJSReLU ? v[i] + 0.5f * v[i] * v[i] : v[i] * v[i];
      }
      by<E>().narrow(v, m, z + k), by<E>().narrow(d, m, out + k);
    }
  }, 64 * kSmall);
  return slope;
}

// The entries of φ(z); z is contiguous [s.tokens, s.units]. With `limits` [s.units] those of z
// itself whose size is above their unit's limit.
template <class E>
Packed pack_dense(const Tensor& z, Shape s, Phi phi, const float* limits = nullptr) {
  const E* in = data<E>(z);
  const auto mask = scratch<uint64_t>(s.tokens * s.words());
  split(s.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      by<E>().mask(in + t * s.units, s.units, phi.floor, limits, &mask[t * s.words()]);
  }, kSmall);
  Packed p{empty<int64_t>({s.segments() + 1}), Tensor(), Tensor(), Tensor()};
  int64_t* pointer = data<int64_t>(p.pointer);
  bits_of(mask.get(), s, pointer, p.index);
  const int64_t n = pointer[s.segments()];
  const int32_t* index = data<int32_t>(p.index);
  p.value = empty<E>({n});
  E* value = data<E>(p.value);
  split(s.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t k = pointer[t * s.blocks()]; k < pointer[(t + 1) * s.blocks()]; k++)
        value[k] = in[t * s.units + index[k]];
  }, kSmall);
  p.slope = activate(value, n, phi.act);
  return p;
}

// v [..., H] with 0 where its size is at or below the threshold [H] of its unit.
Tensor cut(const Tensor& v, const Tensor& threshold) {
  return by_dtype("v", v, [&](auto e) {
    using E = decltype(e);
    const int64_t units = v.dim() ? v.size(-1) : 0, n = tokens_of<E>("v", v, units);
    require<float>("threshold", threshold, {units});
    std::vector<int64_t> sizes(v.sizes().begin(), v.sizes().end());
    Tensor out = torch::stable::empty(sizes, v.scalar_type());
    split(n, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; t++)
        by<E>().cut(data<E>(v) + t * units, units, data<float>(threshold),
                    data<E>(out) + t * units);
    }, kSmall);
    return out;
  });
}

bool few(int64_t rows) { return rows < 4 * threads(); }

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
template <class E>
Entries rows_of(const Tensor& pointer, const Tensor& value, int64_t n) {
  require<E>("value", value, {-1});
  const int64_t blocks = check_pointer(pointer, count("n", n), -1, value.numel());
  return {data<int64_t>(pointer), nullptr, blocks};
}

// Columns whose numbers fit 16 bits: an index that is kept for backward has them where they do.
constexpr int64_t kShort = 1 << 15;

struct Given {
  Entries entries;
  std::optional<Scratch<int32_t>> widened;
};

// The entries of a matrix [n, columns].
Given entries_of(const Tensor& pointer, const Tensor& index, int64_t n, int64_t columns) {
  Given given{};
  const bool narrow = holds<int16_t>(index);
  narrow ? require<int16_t>("index", index, {-1}) : require<int32_t>("index", index, {-1});
  const int64_t nnz = index.numel();
  const int64_t blocks = check_pointer(pointer, count("n", n), blocks_of(columns), nnz);
  const int32_t* i;
  if (narrow) {
    given.widened.emplace(nnz);
    std::copy_n(data<int16_t>(index), nnz, given.widened->get());
    i = given.widened->get();
  } else
    i = data<int32_t>(index);
  if (!everywhere(nnz, [=](int64_t a, int64_t b) {
        return kernels()->below(i + a, b - a, columns);
      }))
    refuse("index must be at least 0 and below " + std::to_string(columns));
  given.entries = {data<int64_t>(pointer), i, blocks};
  return given;
}

Tensor shortened(const Tensor& index, int64_t columns) {
  if (columns > kShort) return index;
  Tensor out = empty<int16_t>({index.numel()});
  std::copy_n(data<int32_t>(index), index.numel(), data<int16_t>(out));
  return out;
}

// The same entries by unit: counting sort, in chunks of tokens, each on its own.
std::tuple<Tensor, Tensor, Tensor> by_unit(const Tensor& pointer, const Tensor& index,
                                           const Tensor& value, int64_t tokens, int64_t units) {
  constexpr int64_t chunk = 128, per_block = kBlock / chunk;
  const Given given = entries_of(pointer, index, tokens, count("units", units));
  const Entries a = given.entries;
  const int64_t blocks = blocks_of(tokens), chunks = ceil_div(tokens, chunk), n = index.numel();
  Tensor out_pointer = empty<int64_t>({units * blocks + 1}), token = empty<int32_t>({n});
  int64_t* p = data<int64_t>(out_pointer);
  int32_t* row = data<int32_t>(token);
  const auto next = scratch<int64_t>(chunks * units);  // counts, then where the next entry goes
  const auto each = [&](auto visit) {
    split(chunks, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; c++)
        for (int64_t t = c * chunk; t < (c + 1) * chunk && t < tokens; t++)
          for (int64_t k = a.pointer[t * a.blocks]; k < a.pointer[(t + 1) * a.blocks]; k++)
            visit(t, k, next[c * units + a.index[k]]);
    });
  };
  std::fill_n(next.get(), chunks * units, 0);
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
  return by_dtype("value", value, [&](auto e) {
    using E = decltype(e);
    require<E>("value", value, {n});
    Tensor sorted = empty<E>({n});
    each([&, v = data<E>(value), o = data<E>(sorted)](int64_t t, int64_t k, int64_t& to) {
      row[to] = static_cast<int32_t>(t);
      o[to++] = v[k];
    });
    return std::tuple{out_pointer, token, sorted};
  });
}

}  // namespace
}  // namespace actsparse

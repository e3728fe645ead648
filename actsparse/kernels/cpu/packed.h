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

// The entries of φ(z); z is contiguous [s.tokens, s.units].
template <class E>
Packed pack_dense(const Tensor& z, Shape s, Phi phi) {
  const E* in = data<E>(z);
  const auto mask = scratch<uint64_t>(s.tokens * s.words());
  split(s.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      by<E>().mask(in + t * s.units, s.units, phi.floor, &mask[t * s.words()]);
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

// ---- products -------------------------------------------------------------------------------

constexpr int64_t kFew = 16;  // rows whose entries read most of their rows of the other side once

bool few(int64_t rows) { return rows < 4 * threads(); }

// Blocks of entries whose rows of a panel take a share of the second-level cache.
int64_t blocks_in(double share) {
  return std::max<int64_t>(1, (int64_t)(share * (double)cache()) / (256 * kBlock));
}

// out [n, d] = a rows + bias; `turned`: out is [d, n].
template <class E>
void multiply_into(Entries a, const E* value, const Panels<E>& rows, int64_t n, const float* bias,
                   E* out, bool turned) {
  constexpr int64_t wide = kPanel<E>;
  const int64_t per = blocks_in(0.8), d = rows.d, entries = a.pointer[n * a.blocks];
  const bool ahead = entries < 2 * rows.rows;  // not worth reading a whole panel
  const bool whole = a.blocks <= per;
  const auto part = [&](int64_t p, const E* panel, Range blocks, Range r, E* to, int64_t stride,
                        float* carry) {
    by<E>().multiply(a, r, blocks, value, panel, bias ? bias + p * wide : nullptr, carry,
                     blocks.begin == 0, blocks.end == a.blocks, to, stride,
                     std::min(wide, d - p * wide), ahead);
  };
  const auto block = [&](Range r, Range panels) {
    const int64_t n_rows = r.end - r.begin;
    const auto room = scratch<E>(rows.room(per * kBlock));
    const auto carry = scratch<float>(whole ? 0 : n_rows * wide);
    const auto slab = scratch<E>(turned ? (whole ? 64 : n_rows) * wide : 0);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int64_t across = std::min(wide, d - p * wide);
      for (int64_t b = 0; b < a.blocks; b += per) {
        const Range blocks{b, std::min(b + per, a.blocks)};
        const Range some{b * kBlock, std::min(blocks.end * kBlock, rows.rows)};
        const E* panel = rows.panel(p, some, room.get(), !ahead);
        const int64_t step = turned && whole ? 64 : n_rows;
        for (int64_t i = r.begin; i < r.end; i += step) {
          const int64_t end = std::min(i + step, r.end);
          if (!turned) {
            part(p, panel, blocks, {i, end}, out + i * d + p * wide, d, carry.get());
            continue;
          }
          part(p, panel, blocks, {i, end}, slab.get(), wide, carry.get());
          if (blocks.end == a.blocks)
            by<E>().transpose(slab.get(), wide, end - i, across, out + p * wide * n + i, n);
        }
      }
    }
  };
  if (few(n))
    split(rows.count, [&](int64_t p, int64_t e) { block({0, n}, {p, e}); });
  else
    split(n, [&](int64_t r, int64_t e) { block({r, e}, {0, rows.count}); });
}

// The products of entries' rows on the left with rows on the right, as sums in float32.
template <class E>
class Sums {
 public:
  // `right` [rows, d] by rows, by columns or in panels; `share` of the cache for a part of them
  Sums(Entries a, const E* left, int64_t n, const char* name, const Tensor& right, int64_t rows,
       int64_t d, double share)
      : a_(a),
        plain_(n <= kFew && right.dim() == 2 && !by_columns<E>(name, right, rows, d)),
        per_(few(n) ? 1 : blocks_in(share)),
        of_(ceil_div(a.blocks, per_)),
        sums_(scratch<float>(a.pointer[n * a.blocks] + 8 * n * of_ + 16)) {
    if (plain_) {
      const auto some = [&](Range r, Range b) {
        by<E>().dots(a, r, b, left, data<E>(right), d, sums_.get());
      };
      if (few(n))
        split(a.blocks, [&](int64_t b, int64_t e) { some({0, n}, {b, e}); });
      else
        split(n, [&](int64_t r, int64_t e) { some({r, e}, {0, a.blocks}); });
      return;
    }
    const Panels<E> panels(name, right, rows, d);
    if (!d) std::fill_n(sums_.get(), a.pointer[n * a.blocks] + 8 * n * of_ + 16, 0.f);
    const int64_t stride = panels.count * kPanel<E>;
    std::optional<Scratch<E>> padded;  // the last panel reads whole pieces
    if (stride != d) {
      padded.emplace(n * stride);
      for (int64_t t = 0; t < n; t++) {
        std::copy_n(left + t * d, d, padded->get() + t * stride);
        std::fill_n(padded->get() + t * stride + d, stride - d, E{});
      }
      left = padded->get();
    }
    const auto some = [&](Range r, Range parts) {
      const auto room = scratch<E>(panels.room(per_ * kBlock));
      for (int64_t part = parts.begin; part < parts.end; part++) {
        const Range blocks{part * per_, std::min((part + 1) * per_, a.blocks)};
        const Range some{blocks.begin * kBlock, std::min(blocks.end * kBlock, rows)};
        for (int64_t p = 0; p < panels.count; p++) {
          const E* panel = panels.panel(p, some, room.get(), n > kFew);
          by<E>().sample(a, r, blocks, of_, part, left + p * kPanel<E>, stride, panel, sums_.get(),
                         p == 0);
        }
      }
    };
    if (few(n))
      split(of_, [&](int64_t b, int64_t e) { some({0, n}, {b, e}); });
    else
      split(n, [&](int64_t r, int64_t e) { some({r, e}, {0, of_}); });
  }

  // f(k, n, sums) for the pieces of token t's entries whose sums lie together, from entry k on.
  template <class F>
  void each(int64_t t, F f) const {
    const int64_t* p = a_.pointer + t * a_.blocks;
    for (int64_t part = 0; part < of_; part++) {
      const int64_t k = p[part * per_], end = p[std::min((part + 1) * per_, a_.blocks)];
      f(k, end - k, sums_.get() + (plain_ ? k : aligned_place(k, t * of_ + part)));
    }
  }

 private:
  Entries a_;
  bool plain_;
  int64_t per_, of_;
  Scratch<float> sums_;
};

// value[k] = sum + bias, rounded to E.
template <class E>
void sample_into(Entries a, const E* left, int64_t n, const char* name, const Tensor& right,
                 int64_t rows, int64_t d, const float* bias, E* value) {
  const Sums<E> sums(a, left, n, name, right, rows, d, 0.5);
  split(n, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
      sums.each(t, [&](int64_t k, int64_t n, float* z) {
        for (int64_t i = 0; bias && i < n; i++) z[i] += bias[a.index[k + i]];
        by<E>().narrow(z, n, value + k);
      });
  }, kSmall);
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

// Entries without those whose value is exactly zero, which products skip whatever they meet.
template <class E>
struct Nonzero {
  Nonzero(Entries& a, const E*& value, int64_t n) {
    const int64_t all = a.pointer[n * a.blocks];
    int64_t zeros = 0;
    for (int64_t k = 0; k < all; k++) zeros += wide(value[k]) == 0.f;
    if (!zeros) return;
    pointer.emplace(n * a.blocks + 1), index.emplace(all), kept.emplace(all);
    int64_t o = 0;
    for (int64_t i = 0; i < n * a.blocks; i++) {
      (*pointer)[i] = o;
      for (int64_t k = a.pointer[i]; k < a.pointer[i + 1]; k++)
        if (wide(value[k]) != 0.f) (*index)[o] = a.index[k], (*kept)[o++] = value[k];
    }
    (*pointer)[n * a.blocks] = o;
    a = {pointer->get(), index->get(), a.blocks}, value = kept->get();
  }
  std::optional<Scratch<int64_t>> pointer;
  std::optional<Scratch<int32_t>> index;
  std::optional<Scratch<E>> kept;
};

// rows [units, d] by rows, by columns or in panels.
Tensor multiply(const Tensor& pointer, const Tensor& index, const Tensor& value, const Tensor& rows,
                const Maybe& bias, int64_t n, int64_t d, bool turned) {
  return by_dtype("rows", rows, [&](auto e) {
    using E = decltype(e);
    const int64_t units = rows_of(rows);
    const Given given = entries_of(pointer, index, n, units);
    Entries a = given.entries;
    require<E>("bias", bias, count("d", d));
    require<E>("value", value, {index.numel()});
    const Panels<E> panels("rows", rows, units, d);
    const E* v = data<E>(value);
    const Nonzero<E> kept(a, v, n);
    const auto plus = floats<E>(bias, d, panels.count * kPanel<E>);
    Tensor out = turned ? empty<E>({d, n}) : empty<E>({n, d});
    multiply_into(a, v, panels, n, get(plus), data<E>(out), turned);
    return out;
  });
}

Tensor sample(const Tensor& pointer, const Tensor& index, const Tensor& x, const Tensor& up,
              const Maybe& bias) {
  return by_dtype("x", x, [&](auto e) {
    using E = decltype(e);
    const auto [n, d] = sizes_of("x", x);
    const int64_t units = rows_of(up);
    const Given given = entries_of(pointer, index, n, units);
    const Entries a = given.entries;
    require<E>("x", x, {n, d});
    require<E>("bias", bias, units);
    const auto plus = floats<E>(bias, units, units);
    Tensor value = empty<E>({index.numel()});
    sample_into(a, data<E>(x), n, "up", up, units, d, get(plus), data<E>(value));
    return value;
  });
}

// A copy of a matrix [rows, d] in panels.
Tensor panels(const Tensor& matrix) {
  return by_dtype("matrix", matrix, [&](auto e) {
    using E = decltype(e);
    const auto [rows, d] = sizes_of("matrix", matrix);
    const Panels<E> made("matrix", matrix, rows, d);
    Tensor out = empty<E>({made.count, rows, made.wide});
    large_pages(out.data_ptr(), made.count * rows * 256);
    made.fill(data<E>(out));
    return out;
  });
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

// f(r, begin, end) with the entries of each of n rows.
template <class F>
void each_row(Entries e, int64_t n, F f) {
  split(n, [=](int64_t a, int64_t b) {
    for (int64_t r = a; r < b; r++) f(r, e.pointer[r * e.blocks], e.pointer[(r + 1) * e.blocks]);
  }, kSmall);
}

// Σv of each row's entries.
Tensor row_sums(const Tensor& pointer, const Tensor& value, int64_t n) {
  return by_dtype("value", value, [&](auto e) {
    using E = decltype(e);
    const Entries a = rows_of<E>(pointer, value, n);
    Tensor out = empty<E>({n});
    each_row(a, n, [o = data<E>(out), v = data<E>(value)](int64_t r, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t k = begin; k < end; k++) sum += wide(v[k]);
      put((float)sum, o + r);
    });
    return out;
  });
}

// Σ|v| and √Σv² of each row's entries.
std::tuple<Tensor, Tensor> row_norms(const Tensor& pointer, const Tensor& value, int64_t n) {
  return by_dtype("value", value, [&](auto e) {
    using E = decltype(e);
    const Entries a = rows_of<E>(pointer, value, n);
    Tensor one = empty<E>({n}), two = empty<E>({n});
    E *o = data<E>(one), *t = data<E>(two);
    each_row(a, n, [=, v = data<E>(value)](int64_t r, int64_t begin, int64_t end) {
      double sum = 0, squares = 0;
      for (int64_t k = begin; k < end; k++) {
        const double each = wide(v[k]);
        sum += std::fabs(each);
        squares += each * each;
      }
      put((float)sum, o + r), put((float)std::sqrt(squares), t + r);
    });
    return std::tuple{one, two};
  });
}

// Gradients of entries, given those of their rows' norms; of a zero it is 0.
Tensor row_norms_backward(const Tensor& pointer, const Tensor& value, const Tensor& two,
                          const Tensor& grad_one, const Tensor& grad_two) {
  return by_dtype("value", value, [&](auto e) {
    using E = decltype(e);
    require<E>("two", two, {-1});
    const int64_t n = two.numel();
    const Entries a = rows_of<E>(pointer, value, n);
    require<E>("grad_one", grad_one, {n});
    require<E>("grad_two", grad_two, {n});
    Tensor out = empty<E>({value.numel()});
    const E *v = data<E>(value), *norm = data<E>(two);
    const E *first = data<E>(grad_one), *second = data<E>(grad_two);
    each_row(a, n, [=, o = data<E>(out)](int64_t r, int64_t begin, int64_t end) {
      const float g = wide(first[r]), length = wide(norm[r]);
      const float s = length == 0.f ? wide(second[r]) : wide(second[r]) / length;
      for (int64_t k = begin; k < end; k++) {
        const float each = wide(v[k]);
        put((each > 0.f ? g : each < 0.f ? -g : 0.f) + s * each, o + k);
      }
    });
    return out;
  });
}

}  // namespace
}  // namespace actsparse

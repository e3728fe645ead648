// Products with packed entries: of entries with rows, and of two rows for each entry.
#pragma once
#include "packed.h"

namespace actsparse {
namespace {

constexpr int64_t kFew = 16;  // rows whose entries read most of their rows of the other side once

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

// x upᵀ + bias of few tokens x [..., d]: rows of up come from memory one after the other.
Tensor linear(const Tensor& x, const Tensor& up, const Maybe& bias) {
  return by_dtype("x", x, [&](auto e) {
    using E = decltype(e);
    const auto [units, d] = sizes_of("up", up);
    const int64_t n = tokens_of<E>("x", x, d);
    require<E>("up", up, {units, d});
    require<E>("bias", bias, units);
    const Shape s{n, units};
    const auto pointer = scratch<int64_t>(s.segments() + 1);
    const auto index = scratch<int32_t>(n * units);
    for (int64_t i = 0; i <= s.segments(); i++)
      pointer[i] = i / s.blocks() * units + i % s.blocks() * kBlock;
    for (int64_t k = 0; k < n * units; k++) index[k] = static_cast<int32_t>(k % units);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = units;
    Tensor z = torch::stable::empty(sizes, x.scalar_type());
    const auto plus = floats<E>(bias, units, units);
    sample_into({pointer.get(), index.get(), s.blocks()}, data<E>(x), n, "up", up, units, d,
                get(plus), data<E>(z));
    return z;
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

}  // namespace
}  // namespace actsparse

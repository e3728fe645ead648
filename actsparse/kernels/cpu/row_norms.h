// Sums and norms of rows of packed entries, and the gradients of these.
#pragma once
#include "packed.h"

namespace actsparse {
namespace {

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

// The kernels as torch operators, through PyTorch's stable ABI of torch 2.11.
#include "row_norms.h"
#include "screen.h"

namespace actsparse {
namespace {

using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Parts parts(const Packed& p, int64_t units) {
  return {p.pointer, shortened(p.index, units), p.value, p.slope};
}

// φ is 0 exactly where z <= floor; act says what it is above. z is contiguous [N, H].
Parts pack(const Tensor& z, int64_t act, double floor) {
  const Phi phi(act, floor);
  const auto [tokens, units] = sizes_of("z", z);
  return by_dtype("z", z, [&, tokens = tokens, units = units](auto e) {
    using E = decltype(e);
    require<E>("z", z, {tokens, units});
    return parts(pack_dense<E>(z, {tokens, units}, phi), units);
  });
}

// up [H, D] by rows or by columns, or in panels.
Parts screen(const Tensor& x, const Tensor& up, const Maybe& bias, const Tensor& codes,
             const Tensor& shift, const Tensor& bounds, int64_t act, double floor) {
  const Phi phi(act, floor);
  const auto [tokens, d] = sizes_of("x", x);
  const Shape s{tokens, rows_of(up)};
  return by_dtype("x", x, [&, tokens = tokens, d = d](auto e) {
    using E = decltype(e);
    require<E>("x", x, {tokens, d});
    return parts(pack_screened<E>(x, d, up, bias, {codes, shift, bounds}, s, phi), s.units);
  });
}

std::tuple<Tensor, Tensor> candidates(const Tensor& x, const Tensor& up, const Maybe& bias,
                                      const Tensor& codes, const Tensor& shift,
                                      const Tensor& bounds, double floor) {
  const auto [tokens, d] = sizes_of("x", x);
  const Shape s{tokens, rows_of(up)};
  return by_dtype("x", x, [&, tokens = tokens, d = d](auto e) {
    using E = decltype(e);
    require<E>("x", x, {tokens, d});
    by_columns<E>("up", up, s.units, d);
    require<E>("bias", bias, s.units);
    const auto plus = floats<E>(bias, s.units, s.units);
    return candidates_of<E>(x, d, get(plus), {codes, shift, bounds}, s, Phi(kReLU, floor).floor);
  });
}

// The other matrix of a gated block and its bias; none of a plain one.
struct Second {
  const Maybe &up, &bias;
};

// y like x, which is contiguous [..., D]: no gradients, nothing kept. rows are down's, [H, D].
template <class E>
Tensor output(const Tensor& x, Packed p, Shape s, int64_t inner, const Second& second,
              const float* limit, const Tensor& tokens, const Tensor& rows, const Maybe& down_bias,
              int64_t d) {
  const Entries a{data<int64_t>(p.pointer), data<int32_t>(p.index), s.blocks()};
  require<E>("down_bias", down_bias, count("d", d));
  E* value = data<E>(p.value);
  if (second.up) {
    require<E>("second_bias", second.bias, s.units);
    const auto plus = floats<E>(second.bias, s.units, s.units);
    const int64_t n = p.index.numel();
    const auto other = scratch<E>(n);
    sample_into(a, data<E>(tokens), s.tokens, "second", *second.up, s.units, inner, get(plus),
                other.get());
    const int32_t* unit = data<int32_t>(p.index);
    for (int64_t k = 0; k < n; k++) {
      put(wide(value[k]) * wide(other[k]), value + k);
      if (limit && std::fabs(wide(value[k])) <= limit[unit[k]]) put(0.f, value + k);
    }
  }
  const Panels<E> panels("rows", rows, s.units, d);
  const auto plus = floats<E>(down_bias, d, panels.count * kPanel<E>);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = d;
  Tensor y = torch::stable::empty(sizes, x.scalar_type());
  Entries nonzero = a;
  const E* values = value;
  const Nonzero<E> kept(nonzero, values, s.tokens);
  multiply_into(nonzero, values, panels, s.tokens, get(plus), data<E>(y), false);
  return y;
}

// With a threshold [H] z is φ(z) already: entries whose size is above it count. With [2, H] those
// whose product with second is at most the second row are zeros.
Tensor forward(const Tensor& z, const Maybe& threshold, const Tensor& x, const Maybe& second,
               const Maybe& second_bias, const Tensor& rows, const Maybe& down_bias, int64_t d,
               int64_t act, double floor) {
  const Phi phi(act, floor);
  return by_dtype("z", z, [&](auto e) {
    using E = decltype(e);
    const int64_t units = rows_of(rows), inner = x.dim() ? x.size(-1) : 0;
    const Shape s{tokens_of<E>("z", z, units), units};
    if (tokens_of<E>("x", x, inner) != s.tokens) refuse("x", Type<E>::name, "tokens like z's", x);
    const bool two = threshold && second && threshold->dim() == 2;
    const auto check = [&](auto t) {
      two ? require<decltype(t)>("threshold", *threshold, {2, units})
          : require<decltype(t)>("threshold", threshold, units);
    };
    // a model in bfloat16 has its thresholds in it
    const bool narrow = threshold && holds<bf16>(*threshold);
    narrow ? check(bf16{}) : check(float{});
    const int64_t limits = two ? 2 * units : units;
    const auto own = floats<bf16>(narrow ? threshold : Maybe(), limits, limits);
    const float* cut = narrow ? get(own) : data<float>(threshold);
    return output<E>(z, pack_dense<E>(z, s, phi, cut), s, inner, {second, second_bias},
                     two ? cut + units : nullptr, x, rows, down_bias, d);
  });
}

Tensor forward_screened(const Tensor& x, const Tensor& up, const Maybe& bias, const Tensor& codes,
                        const Tensor& shift, const Tensor& bounds, const Maybe& second,
                        const Maybe& second_bias, const Tensor& rows, const Maybe& down_bias,
                        int64_t d, int64_t act, double floor) {
  const Phi phi(act, floor);
  return by_dtype("x", x, [&](auto e) {
    using E = decltype(e);
    const int64_t inner = x.dim() ? x.size(-1) : 0;
    const Shape s{tokens_of<E>("x", x, inner), rows_of(up)};
    return output<E>(x, pack_screened<E>(x, inner, up, bias, {codes, shift, bounds}, s, phi), s,
                     inner, {second, second_bias}, nullptr, x, rows, down_bias, d);
  });
}

// The bits of 16 entries spread over each weight, mixed: tells most changes from no change.
void mix(const char* name, const Tensor& t, uint64_t& mixed) {
  const auto [rows, columns] = sizes_of(name, t);
  by_dtype(name, t, [&, rows = rows, columns = columns](auto e) {
    using E = decltype(e);
    if (!holds<E>(t)) refuse(name, Type<E>::name, shown(t.sizes()), t);
    const int64_t n = rows * columns, step = ceil_div(n, 16) | 1;
    const int64_t down = t.strides()[0], right = t.strides()[1];
    // all are fetched before any is read: one after the other they would take 10 µs from memory
    const E* entries[16];
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += step) {
      entries[found] = data<E>(t) + i / columns * down + i % columns * right;
      __builtin_prefetch(entries[found++]);
    }
    for (int64_t k = 0; k < found; k++) {
      uint32_t bits = 0;
      memcpy(&bits, entries[k], sizeof(E));
      mixed = (mixed ^ bits) * 0x9E3779B97F4A7C15u;
    }
  });
}

// One call for all matrices of a block, since a call costs as much as what it reads.
int64_t fingerprint(const Tensor& weight, const Maybe& second, const Maybe& third) {
  uint64_t mixed = 0;
  mix("weight", weight, mixed);
  if (second) mix("second", *second, mixed);
  if (third) mix("third", *third, mixed);
  return static_cast<int64_t>(mixed);
}

}  // namespace

STABLE_TORCH_LIBRARY(actsparse_cpu, m) {
  m.def("level(int wanted) -> int");
  m.def("fingerprint(Tensor weight, Tensor? second, Tensor? third) -> int");
  m.def("pack(Tensor z, int act, float floor) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("multiply(Tensor pointer, Tensor index, Tensor value, Tensor rows, Tensor? bias, int n, "
        "int d, bool turned) -> Tensor");
  m.def("sample(Tensor pointer, Tensor index, Tensor x, Tensor up, Tensor? bias) -> Tensor");
  m.def("cut(Tensor v, Tensor threshold) -> Tensor");
  m.def("linear(Tensor x, Tensor up, Tensor? bias) -> Tensor");
  m.def("by_unit(Tensor pointer, Tensor index, Tensor value, int n, int units) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("row_sums(Tensor pointer, Tensor value, int n) -> Tensor");
  m.def("row_norms(Tensor pointer, Tensor value, int n) -> (Tensor, Tensor)");
  m.def("row_norms_backward(Tensor pointer, Tensor value, Tensor two, Tensor grad_one, "
        "Tensor grad_two) -> Tensor");
  m.def("panels(Tensor matrix) -> Tensor");
  m.def("quantise(Tensor up) -> (Tensor, Tensor, Tensor)");
  m.def("screen(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, Tensor bounds, "
        "int act, float floor) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("candidates(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, Tensor bounds, "
        "float floor) -> (Tensor, Tensor)");
  m.def("forward(Tensor z, Tensor? threshold, Tensor x, Tensor? second, Tensor? second_bias, "
        "Tensor rows, Tensor? down_bias, int d, int act, float floor) -> Tensor");
  m.def("forward_screened(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, "
        "Tensor bounds, Tensor? second, Tensor? second_bias, Tensor rows, Tensor? down_bias, "
        "int d, int act, float floor) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(actsparse_cpu, CompositeExplicitAutograd, m) {
  m.impl("level", TORCH_BOX(&level));
}

STABLE_TORCH_LIBRARY_IMPL(actsparse_cpu, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("cut", TORCH_BOX(&cut));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("by_unit", TORCH_BOX(&by_unit));
  m.impl("row_sums", TORCH_BOX(&row_sums));
  m.impl("row_norms", TORCH_BOX(&row_norms));
  m.impl("row_norms_backward", TORCH_BOX(&row_norms_backward));
  m.impl("panels", TORCH_BOX(&panels));
  m.impl("quantise", TORCH_BOX(&quantise));
  m.impl("screen", TORCH_BOX(&screen));
  m.impl("candidates", TORCH_BOX(&candidates));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_screened", TORCH_BOX(&forward_screened));
}

}  // namespace actsparse

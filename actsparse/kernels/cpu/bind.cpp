// The kernels as torch operators, through PyTorch's stable ABI of torch 2.11.
#include "screen.h"

namespace actsparse {
namespace {

using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Parts parts(const Packed& p) { return {p.pointer, p.index, p.value, p.slope}; }

// N and H of x [N, D] and up [H, D], float32 of any layout.
Shape shape_of(const Tensor& x, const Tensor& up) {
  const auto [units, d] = sizes_of("up", up);
  const auto [tokens, channels] = sizes_of("x", x);
  if (!holds<float>(up)) refuse("up", Type<float>::name, shown(up.sizes()), up);
  if (channels != d || !holds<float>(x))
    refuse("x", Type<float>::name, shown(std::initializer_list<int64_t>{tokens, d}), x);
  return {tokens, units};
}

// φ is 0 exactly where x up + bias <= floor; act says what it is above.
Parts pack(const Tensor& x, const Tensor& up, const Maybe& bias, int64_t act, double floor) {
  const Phi phi(act, floor);
  const Shape s = shape_of(x, up);
  const Tensor z = torch::stable::matmul(x, torch::stable::transpose(up, 0, 1));
  return parts(pack_dense(z, bias, s, phi));
}

Parts screen(const Tensor& x, const Tensor& up, const Maybe& bias, const Tensor& codes,
             const Tensor& shift, const Tensor& bounds, int64_t act, double floor) {
  const Shape s = shape_of(x, up);
  return parts(pack_screened(x, up, bias, {codes, shift, bounds}, s, Phi(act, floor)));
}

std::tuple<Tensor, Tensor> candidates(const Tensor& x, const Tensor& up, const Maybe& bias,
                                      const Tensor& codes, const Tensor& shift,
                                      const Tensor& bounds, double floor) {
  const Shape s = shape_of(x, up);
  return candidates_of(x, up.size(1), bias, {codes, shift, bounds}, s, Phi(kReLU, floor).floor);
}

// y like x, which is contiguous [..., D]: no gradients, nothing kept.
Tensor output(const Tensor& x, int64_t d) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = d;
  return torch::stable::empty(sizes, x.scalar_type());
}

Tensor multiply_packed(const Packed& p, const Tensor& rows, const Maybe& bias, Shape s, Tensor y) {
  const Entries a{data<int64_t>(p.pointer), data<int32_t>(p.index), s.blocks()};
  multiply_into(a, data<float>(p.value), data<float>(rows), s.tokens, rows.size(1),
                data<float>(bias), data<float>(y));
  return y;
}

Tensor forward(const Tensor& z, const Maybe& bias, const Tensor& rows, const Maybe& down_bias,
               int64_t act, double floor) {
  const Phi phi(act, floor);
  const auto [units, d] = sizes_of("rows", rows);
  const Shape s{tokens_of("z", z, units), units};
  require("rows", rows, {units, d});
  require("down_bias", down_bias, d);
  return multiply_packed(pack_dense(z, bias, s, phi), rows, down_bias, s, output(z, d));
}

Tensor forward_screened(const Tensor& x, const Tensor& up, const Maybe& bias, const Tensor& codes,
                        const Tensor& shift, const Tensor& bounds, const Tensor& rows,
                        const Maybe& down_bias, int64_t act, double floor) {
  const Phi phi(act, floor);
  const Sizes sizes = sizes_of("up", up);
  const Shape s{tokens_of("x", x, sizes.columns), sizes.rows};
  const int64_t d = sizes_of("rows", rows).columns;
  require("rows", rows, {s.units, d});
  require("down_bias", down_bias, d);
  const Packed p = pack_screened(x, up, bias, {codes, shift, bounds}, s, phi);
  return multiply_packed(p, rows, down_bias, s, output(x, d));
}

// The bits of 64 entries spread over a weight, mixed: tells most changes of a weight from no change.
int64_t fingerprint(const Tensor& t) {
  const auto [rows, columns] = sizes_of("weight", t);
  if (!holds<float>(t)) refuse("weight", Type<float>::name, shown(t.sizes()), t);
  const int64_t n = rows * columns, step = ceil_div(n, 64) | 1;
  const int64_t down = t.strides()[0], right = t.strides()[1];
  const uint32_t* bits = static_cast<const uint32_t*>(t.data_ptr());
  uint64_t mixed = 0;
  for (int64_t i = 0; i < n; i += step)
    mixed = (mixed ^ bits[i / columns * down + i % columns * right]) * 0x9E3779B97F4A7C15u;
  return static_cast<int64_t>(mixed);
}

}  // namespace

STABLE_TORCH_LIBRARY(actsparse_cpu, m) {
  m.def("level(int wanted) -> int");
  m.def("fingerprint(Tensor weight) -> int");
  m.def("pack(Tensor x, Tensor up, Tensor? bias, int act, float floor) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("multiply(Tensor pointer, Tensor index, Tensor value, Tensor rows, Tensor? bias, int n, "
        "bool turned) -> Tensor");
  m.def("sample(Tensor pointer, Tensor index, Tensor x, Tensor up, Tensor? bias) -> Tensor");
  m.def("by_unit(Tensor pointer, Tensor index, Tensor value, int n, int units) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("row_sums(Tensor pointer, Tensor value, int n) -> Tensor");
  m.def("row_norms(Tensor pointer, Tensor value, int n) -> (Tensor, Tensor)");
  m.def("row_norms_backward(Tensor pointer, Tensor value, Tensor two, Tensor grad_one, "
        "Tensor grad_two) -> Tensor");
  m.def("turned(Tensor matrix) -> Tensor");
  m.def("quantise(Tensor up) -> (Tensor, Tensor, Tensor)");
  m.def("screen(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, Tensor bounds, "
        "int act, float floor) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("candidates(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, Tensor bounds, "
        "float floor) -> (Tensor, Tensor)");
  m.def("forward(Tensor z, Tensor? bias, Tensor rows, Tensor? down_bias, int act, float floor) "
        "-> Tensor");
  m.def("forward_screened(Tensor x, Tensor up, Tensor? bias, Tensor codes, Tensor shift, "
        "Tensor bounds, Tensor rows, Tensor? down_bias, int act, float floor) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(actsparse_cpu, CompositeExplicitAutograd, m) {
  m.impl("level", TORCH_BOX(&level));
}

STABLE_TORCH_LIBRARY_IMPL(actsparse_cpu, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("by_unit", TORCH_BOX(&by_unit));
  m.impl("row_sums", TORCH_BOX(&row_sums));
  m.impl("row_norms", TORCH_BOX(&row_norms));
  m.impl("row_norms_backward", TORCH_BOX(&row_norms_backward));
  m.impl("turned", TORCH_BOX(&turned));
  m.impl("quantise", TORCH_BOX(&quantise));
  m.impl("screen", TORCH_BOX(&screen));
  m.impl("candidates", TORCH_BOX(&candidates));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_screened", TORCH_BOX(&forward_screened));
}

}  // namespace actsparse

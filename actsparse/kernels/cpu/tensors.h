// Which kernels run, and what the operators need of tensors and threads.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"


namespace actsparse {
namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kBlock = 384;  // rows of V, U, x or gy that a block of entries reads: L2's worth

// ---- which kernels --------------------------------------------------------------------------

const Kernels* of_level(int64_t level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](auto... flags) { return (flags && ...); };
  if (level == 2 && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                        __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512dq"),
                        __builtin_cpu_supports("avx512vnni")))
    return &avx512_kernels;
  if (level == 1 && has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma")))
    return &avx2_kernels;
#endif
  return level == 0 ? &baseline_kernels : nullptr;
}

int64_t best_level() {
  for (int64_t level = 2; level > 0; level--)
    if (of_level(level)) return level;
  return 0;
}

int64_t current_level = best_level();
const Kernels* kernels = of_level(current_level);

// Choose 0 baseline, 1 AVX2, 2 AVX-512; −1 only asks. Returns the level in use.
int64_t level(int64_t wanted) {
  if (wanted >= 0) {
    STD_TORCH_CHECK(of_level(wanted), "this CPU has no kernels of level ", wanted);
    current_level = wanted;
    kernels = of_level(wanted);
  }
  return current_level;
}

// ---- tensors and threads --------------------------------------------------------------------

template <class T>
int32_t dtype_of();
template <>
int32_t dtype_of<float>() { return aoti_torch_dtype_float32(); }
template <>
int32_t dtype_of<int32_t>() { return aoti_torch_dtype_int32(); }
template <>
int32_t dtype_of<int64_t>() { return aoti_torch_dtype_int64(); }
template <>
int32_t dtype_of<int8_t>() { return aoti_torch_dtype_int8(); }

template <class T>
Tensor empty(int64_t rows, int64_t columns = -1) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns < 0 ? 1 : columns, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      columns < 0 ? 1 : 2, sizes, strides, dtype_of<T>(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// float32, contiguous, on the CPU, of these sizes; −1 stands for any.
void require(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool fits = t.is_cpu() && t.is_contiguous() &&
              t.scalar_type() == torch::headeronly::ScalarType::Float &&
              t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) fits = fits && (size < 0 || t.size(i) == size), i++;
  STD_TORCH_CHECK(fits, name, " must be contiguous float32 of the other operands' sizes");
}

void require(const char* name, const Maybe& t, int64_t size) {
  if (t) require(name, *t, {size});
}

int64_t rows_in(const Tensor& t) {
  const int64_t last = t.size(t.dim() - 1);
  return last ? t.numel() / last : 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t threads() { return torch::stable::get_num_threads(); }

// f(begin, end) over [0, n) in one piece for each thread; pieces begin at multiples of `unit`.
template <class F>
void split(int64_t n, F f, int64_t unit = 1) {
  const int64_t units = ceil_div(n, unit);
  if (units <= 1 || threads() == 1) return n ? f(0, n) : void();
  torch::stable::parallel_for(0, units, ceil_div(units, threads()), [&](int64_t a, int64_t b) {
    f(a * unit, b * unit < n ? b * unit : n);
  });
}

}  // namespace
}  // namespace actsparse

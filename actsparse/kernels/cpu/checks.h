// What operators ask of what they are handed: whatever does not fit is refused by name, before
// anything is read.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace actsparse {
namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* name = "float32";
  static int32_t code() { return aoti_torch_dtype_float32(); }
};
template <>
struct Type<bf16> {
  static constexpr const char* name = "bfloat16";
  static int32_t code() { return aoti_torch_dtype_bfloat16(); }
};
template <>
struct Type<int64_t> {
  static constexpr const char* name = "int64";
  static int32_t code() { return aoti_torch_dtype_int64(); }
};
template <>
struct Type<int32_t> {
  static constexpr const char* name = "int32";
  static int32_t code() { return aoti_torch_dtype_int32(); }
};
template <>
struct Type<int16_t> {
  static constexpr const char* name = "int16";
  static int32_t code() { return aoti_torch_dtype_int16(); }
};
template <>
struct Type<int8_t> {
  static constexpr const char* name = "int8";
  static int32_t code() { return aoti_torch_dtype_int8(); }
};

[[noreturn, gnu::cold]] void refuse(const std::string& why) { throw std::runtime_error(why); }

template <class Sizes>
std::string shown(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes)
    text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  return "[" + text + "]";
}

[[noreturn, gnu::cold]] void refuse(const char* name, const char* type, const std::string& sizes,
                                    const Tensor& t) {
  if (!t.defined()) refuse(std::string(name) + " must be a tensor; it is None");
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const bool odd = bytes && reinterpret_cast<uintptr_t>(t.data_ptr()) % t.element_size();
  refuse(std::string(name) + " must be contiguous " + type + " " + sizes + " on the CPU; it is " +
         torch::headeronly::toString(t.scalar_type()) + " " + shown(t.sizes()) + " with strides " +
         shown(t.strides()) + " in a storage of " + std::to_string(bytes) + " bytes" +
         (odd ? ", misaligned" : ""));
}

// Whether t's entries are T's on the CPU, aligned, in memory that is there: a storage can be
// resized under its tensors.
template <class T>
bool holds(const Tensor& t) {
  if (!t.defined()) return false;  // torch hands None to operators that ask for a tensor
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  if (!t.is_cpu() || type != Type<T>::code()) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = t.storage_offset(), bytes;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (!sizes[i]) return true;
    last += (sizes[i] - 1) * strides[i];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return last < bytes / static_cast<int64_t>(sizeof(T)) &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % alignof(T) == 0;
}

// Contiguous T's of these sizes; −1 stands for any.
template <class T>
void require(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  const auto sizes = t.sizes();
  bool fits = holds<T>(t) && sizes.size() == wanted.size() && t.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); i++)
    fits = wanted.begin()[i] < 0 || wanted.begin()[i] == sizes[i];
  if (!fits) refuse(name, Type<T>::name, shown(wanted), t);
}

template <class T>
void require(const char* name, const Maybe& t, int64_t size) {
  if (t) require<T>(name, *t, {size});
}

// A number of rows or columns. Indices have 32 bits, and products of two such numbers fit 64.
int64_t count(const char* name, int64_t n) {
  if (n < 0 || n > std::numeric_limits<int32_t>::max())
    refuse(std::string(name) + " must be from 0 to 2147483647; it is " + std::to_string(n));
  return n;
}

struct Sizes {
  int64_t rows, columns;
};

// The sizes of a matrix; its entries are not looked at.
Sizes sizes_of(const char* name, const Tensor& t) {
  const auto sizes = t.sizes();
  if (sizes.size() != 2) refuse(name, "floating", "[any, any]", t);
  return {count(name, sizes[0]), count(name, sizes[1])};
}

// The tokens of t, contiguous [..., columns].
template <class E>
int64_t tokens_of(const char* name, const Tensor& t, int64_t columns) {
  const auto sizes = t.sizes();
  if (!holds<E>(t) || sizes.empty() || sizes.back() != columns || !t.is_contiguous())
    refuse(name, Type<E>::name, "[..., " + std::to_string(columns) + "]", t);
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < sizes.size(); i++) tokens = count(name, tokens * count(name, sizes[i]));
  return tokens;
}

// f(E()) with the dtype of t's entries.
template <class F>
auto by_dtype(const char* name, const Tensor& t, F f) {
  int32_t type = -1;
  if (t.defined()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  if (type == Type<bf16>::code()) return f(bf16());
  if (type != Type<float>::code()) refuse(name, "float32 or bfloat16", shown(t.sizes()), t);
  return f(float());
}

// φ and the floor up to which it is 0.
struct Phi {
  Phi(int64_t number, double at) : act(number), floor(static_cast<float>(at)) {
    if (act < kReLU || act > kSquaredReLU)
      refuse("act must be 0 (ReLU), 1 (JSReLU) or 2 (squared ReLU); it is " + std::to_string(act));
    if (!(at >= 0)) refuse("floor must be at least 0; it is " + std::to_string(at));
  }
  int64_t act;
  float floor;
};

}  // namespace
}  // namespace actsparse

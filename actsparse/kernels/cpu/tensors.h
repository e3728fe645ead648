// Which kernels run, and what the operators need of tensors and threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <new>
#include <tuple>
#include <vector>

#include "checks.h"

namespace actsparse {
namespace {

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

// Atomic: one thread may choose while others compute.
std::atomic<const Kernels*> chosen{of_level(best_level())};

const Kernels* kernels() { return chosen.load(std::memory_order_relaxed); }

// Choose 0 baseline, 1 AVX2, 2 AVX-512; −1 only asks. Returns the level in use.
int64_t level(int64_t wanted) {
  if (wanted >= 0) {
    if (!of_level(wanted)) refuse("this CPU has no kernels of level " + std::to_string(wanted));
    chosen = of_level(wanted);
  }
  for (int64_t level = 2; level > 0; level--)
    if (kernels() == of_level(level)) return level;
  return 0;
}

// ---- tensors and threads --------------------------------------------------------------------

template <class T>
Tensor empty(int64_t rows, int64_t columns = -1) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns < 0 ? 1 : columns, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      columns < 0 ? 1 : 2, sizes, strides, Type<T>::code(), aoti_torch_device_type_cpu(), 0, &handle));
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

// Memory that a thread used for a call and keeps for its next one: a new page costs a fault, and
// threads that fault side by side wait for each other (two copied a matrix slower than one).
class Pool {
 public:
  struct Block {
    char* memory;
    size_t size;
  };
  Block take(size_t size) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->size >= size && (best == free_.end() || it->size < best->size)) best = it;
    if (best == free_.end()) return {static_cast<char*>(::operator new(size)), size};
    const Block block = *best;
    held_ -= block.size;
    free_.erase(best);
    return block;
  }
  void give(Block block) {
    if (held_ + block.size > kKept) return ::operator delete(block.memory);
    held_ += block.size;
    free_.push_back(block);
  }
  ~Pool() {
    for (const Block& block : free_) ::operator delete(block.memory);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kKept = 0;  // a block that is kept hides what reads past its end
#else
  static constexpr size_t kKept = 64 << 20;
#endif
  std::vector<Block> free_;
  size_t held_ = 0;
};

thread_local Pool pool;

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : block_(pool.take(n * sizeof(T))) {}
  Scratch(Scratch&& other) noexcept : block_(other.block_) { other.block_.memory = nullptr; }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (block_.memory) pool.give(block_);
  }
  T* get() const { return reinterpret_cast<T*>(block_.memory); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  Pool::Block block_;
};

template <class T>
Scratch<T> scratch(int64_t n) {
  return Scratch<T>(n);
}

bool by_columns(const Tensor& t) {
  return t.dim() == 2 && t.strides()[0] == 1 && t.strides()[1] == t.size(0) && !t.is_contiguous();
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

// ---- transposed copies ----------------------------------------------------------------------

// out [columns, rows] = inᵀ; pieces of out, so that no two threads write to one new page
void turn(const float* in, int64_t rows, int64_t columns, float* out) {
  split(columns, [&](int64_t a, int64_t b) {
    kernels()->transpose(in + a, columns, rows, b - a, out + a * rows);
  }, 64);
}

// A matrix by rows: its own memory, or a copy where its columns are what is contiguous.
class Rows {
 public:
  Rows(const char* name, const Tensor& t, int64_t rows, int64_t columns) : data(nullptr) {
    if (!by_columns(t)) {
      require(name, t, {rows, columns});
      data = actsparse::data<float>(t);
      return;
    }
    if (t.size(0) != rows || t.size(1) != columns || !holds<float>(t))
      refuse(name, Type<float>::name, shown(std::initializer_list<int64_t>{rows, columns}), t);
    copy_.emplace(t.size(0) * t.size(1));
    turn(actsparse::data<float>(t), t.size(1), t.size(0), copy_->get());
    data = copy_->get();
  }
  const float* data;

 private:
  std::optional<Scratch<float>> copy_;
};

}  // namespace
}  // namespace actsparse

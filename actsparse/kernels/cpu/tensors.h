// Which kernels run, and what the operators need of tensors and threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <tuple>
#include <vector>

#include "checks.h"

namespace actsparse {
namespace {

constexpr int64_t kBlock = 384;  // columns that share a segment of entries

// ---- which kernels --------------------------------------------------------------------------

const Kernels* of_level(int64_t level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](auto... flags) { return (flags && ...); };
  if (level == 3 && of_level(2) && has(__builtin_cpu_supports("avx512bf16"))) return &avx512bf16_kernels;
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
  for (int64_t level = 3; level > 0; level--)
    if (of_level(level)) return level;
  return 0;
}

// Atomic: one thread may choose while others compute.
std::atomic<const Kernels*> chosen{of_level(best_level())};

const Kernels* kernels() { return chosen.load(std::memory_order_relaxed); }

// Choose 0 baseline, 1 AVX2, 2 AVX-512, 3 with bfloat16; −1 only asks. Returns the level in use.
int64_t level(int64_t wanted) {
  if (wanted >= 0) {
    if (!of_level(wanted)) refuse("this CPU has no kernels of level " + std::to_string(wanted));
    chosen = of_level(wanted);
  }
  for (int64_t level = 3; level > 0; level--)
    if (kernels() == of_level(level)) return level;
  return 0;
}

// ---- tensors and threads --------------------------------------------------------------------

template <class T>
Tensor empty(std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
      Type<T>::code(), aoti_torch_device_type_cpu(), 0, &handle));
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

constexpr size_t kPage = 2 << 20;

// Gathers from memory on large pages miss no translations.
void large_pages(void* memory, size_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + size) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
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
    if (best == free_.end()) {
      const auto align = size < kPage ? kLine : std::align_val_t{kPage};
      char* memory = static_cast<char*>(::operator new(size, align));
      large_pages(memory, size);
      return {memory, size};
    }
    const Block block = *best;
    held_ -= block.size;
    free_.erase(best);
    return block;
  }
  void give(Block block) {
    if (held_ + block.size > kKept) return release(block);
    held_ += block.size;
    free_.push_back(block);
  }
  ~Pool() {
    for (const Block& block : free_) release(block);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kKept = 0;  // a block that is kept hides what reads past its end
#else
  static constexpr size_t kKept = 64 << 20;
#endif
  static void release(Block b) {
    ::operator delete(b.memory, b.size < kPage ? kLine : std::align_val_t{kPage});
  }
  static constexpr std::align_val_t kLine{64};  // a piece of 256 bytes is then 4 cache lines, not 5
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

// ---- panels ----------------------------------------------------------------------------------

template <class E>
const Products<E>& by() { return products_of<E>(kernels()); }

// Whether t [rows, columns] is laid out by columns alone; by rows it must be otherwise.
template <class E>
bool by_columns(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  const bool turned = t.defined() && t.dim() == 2 && !t.is_contiguous() && t.strides()[0] == 1 &&
                      t.strides()[1] == t.size(0);
  if (!turned) require<E>(name, t, {rows, columns});
  else if (t.size(0) != rows || t.size(1) != columns || !holds<E>(t))
    refuse(name, Type<E>::name, shown(std::initializer_list<int64_t>{rows, columns}), t);
  return turned;
}

// The rows of a matrix, or of one in panels.
int64_t rows_of(const Tensor& t) {
  const int64_t n = t.defined() ? t.dim() : 0;
  if (n != 2 && n != 3) refuse("up and rows must be matrices or panels; one has " +
                               std::to_string(n) + " dimensions");
  return count("rows", t.size(n - 2));
}

// A matrix [rows, d] in panels: a tensor of them; or one by rows or by columns, which is copied:
// whole where threads share it, else a panel at a time, which then never leaves the cache.
template <class E>
class Panels {
 public:
  static constexpr int64_t wide = kPanel<E>;

  Panels(const char* name, const Tensor& t, int64_t rows, int64_t d)
      : rows(rows), d(d), count(ceil_div(d, wide)) {
    if (t.defined() && t.dim() == 3) {
      require<E>(name, t, {count, rows, wide});
      whole_ = data<E>(t);
      return;
    }
    turned_ = by_columns<E>(name, t, rows, d);
    from_ = data<E>(t);
    if (threads() == 1) return;
    copy_.emplace(count * rows * wide);
    fill(copy_->get());
    whole_ = copy_->get();
  }

  void fill(E* out) const {
    split(rows, [&](int64_t a, int64_t b) {
      for (int64_t r = a; r < b; r += kBlock)  // a few rows at a time, so that either side is near
        for (int64_t p = 0; p < count; p++)
          copy(p, {r, std::min(r + kBlock, b)}, out + (p * rows + r) * wide);
    }, 64);
  }

  // Panel p, of which the rows r are there; `room` for them if they must be copied. Panels are read
  // in order: the third-level cache gives that thrice as fast as misses.
  const E* panel(int64_t p, Range r, E* room, bool all = true) const {
    if (!whole_) {
      copy(p, r, room);
      return room - r.begin * wide;
    }
    const E* there = whole_ + p * rows * wide;
    for (int64_t i = r.begin * wide; all && i < r.end * wide; i += 64 / (int64_t)sizeof(E))
      __builtin_prefetch(there + i, 0, 2);
    return there;
  }
  int64_t room(int64_t most) const { return whole_ ? 0 : std::min(most, rows) * wide; }

  int64_t rows, d, count;

 private:
  // rows r of panel p, the last filled with zeros
  void copy(int64_t p, Range r, E* to) const {
    const int64_t there = std::min(wide, d - p * wide), n = r.end - r.begin;
    if (there < wide) std::fill_n(to, n * wide, E{});
    if (turned_)
      return by<E>().transpose(from_ + p * wide * rows + r.begin, rows, there, n, to, wide);
    for (int64_t i = 0; i < n; i++) {
      const E* in = from_ + (r.begin + i) * d + p * wide;
      for (int64_t c = 0; c < wide; c += 64 / (int64_t)sizeof(E)) __builtin_prefetch(in + 8 * d + c);
      memcpy(to + i * wide, in, there * sizeof(E));
    }
  }

  const E* from_ = nullptr;
  const E* whole_ = nullptr;
  bool turned_ = false;
  std::optional<Scratch<E>> copy_;
};

// Bytes of the second-level cache, which panels are to stay in.
int64_t cache() {
  static const int64_t bytes = [] {
    const int64_t said = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return said > 0 ? said : int64_t(1) << 20;
  }();
  return bytes;
}

// A vector as floats, with zeros up to `padded` entries; null if there is none.
template <class E>
std::optional<Scratch<float>> floats(const Maybe& t, int64_t n, int64_t padded) {
  if (!t) return std::nullopt;
  Scratch<float> out(padded);
  by<E>().widen(data<E>(*t), n, out.get());
  std::fill(out.get() + n, out.get() + padded, 0.f);
  return out;
}
const float* get(const std::optional<Scratch<float>>& s) { return s ? s->get() : nullptr; }

}  // namespace
}  // namespace actsparse

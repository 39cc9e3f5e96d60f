// Memory for vectors: aligned to cache lines, zeroed, freed by its owner.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "kernels/layout.h"

namespace edgevl {

/// `size` zeroed numbers, the first at a multiple of 64 bytes. Throws std::bad_alloc.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size) : size_(size) {
    if (size > (std::numeric_limits<std::size_t>::max() - kLineBytes) / sizeof(T)) {
      throw std::bad_alloc();
    }
    memory_ = allocate(size * sizeof(T) + kLineBytes);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }

  /// Makes room for `size` numbers; what was in the buffer is lost if it had less.
  void reserve(std::size_t size) {
    if (size > size_) *this = Buffer(size);
  }

 private:
  struct Free {
    std::size_t mapped = 0;  ///< bytes, or 0 where calloc gave it
    void operator()(void* memory) const {
      if (mapped) {
        ::munmap(memory, mapped);
      } else {
        std::free(memory);
      }
    }
  };
  using Memory = std::unique_ptr<void, Free>;

  /// Large blocks are pages of their own: zero without being written to, so that they take memory
  /// when they are used, and given back when they are freed. malloc would fill its holes with them.
  static Memory allocate(std::size_t bytes) {
    constexpr std::size_t kLarge = 1 << 20;
    if (bytes < kLarge) {
      Memory memory(std::calloc(bytes, 1));
      if (!memory) throw std::bad_alloc();
      return memory;
    }
    void* pages =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Fewer faults at the first use, and fewer misses of the address translation's cache.
    if (bytes >= (std::size_t{4} << 20)) ::madvise(pages, bytes, MADV_HUGEPAGE);
#endif
    return Memory(pages, Free{bytes});
  }

  Memory memory_;
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Activations [rows, cols]. Rows are padded, as they would commonly be a multiple of 4 KiB apart,
/// and a column of them would fall on the same few sets of a core's cache.
class Activations {
 public:
  Activations() = default;
  Activations(std::size_t rows, int cols)
      : stride_((static_cast<std::size_t>(cols) / kLanes + 2) * kLanes), data_(rows * stride_) {}

  float* row(std::size_t index) const { return data_.data() + index * stride_; }
  std::size_t stride() const { return stride_; }  ///< floats from row to row

 private:
  std::size_t stride_ = 0;
  Buffer<float> data_;
};

}  // namespace edgevl

// The board's memory as processor and NPU see it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "emulator/problem.h"
#include "model/buffer.h"

namespace edgevl::emulator {

/// CMM: memory with addresses of its own, which the NPU works on, and which the processor sees
/// through its cache.
///
/// An allocation is kept as the NPU sees it, as the processor sees it, and as the processor's view
/// was when the two last met. A line of the cache in which the processor's view differs from that
/// is dirty: it has been written, and the NPU has not seen it. Flushing copies dirty lines to the
/// NPU's view; invalidating copies lines from there. Both work on whole lines.
///
/// Addresses are not used twice, and between allocations is room, so that what lies beyond one, or
/// was freed, is known. Functions throw Problem; they may be called from several threads.
class EDGEVL_EXPORT Memory {
 public:
  enum class Access {
    kCached,  ///< seen by both
    kShared,  ///< likewise, but as one: flushing and invalidating only check where they are
    kDevice,  ///< on a card: the processor cannot see it
  };

  struct Allocated {
    std::uint64_t address;
    void* cpu;  ///< null for kDevice
  };

  /// Zeroed memory; `align` is a power of two, or 0.
  Allocated allocate(std::size_t bytes, std::size_t align, Access access);
  /// Returns its size.
  std::size_t free(std::uint64_t address, const void* cpu);

  void flush(std::uint64_t address, const void* cpu, std::size_t bytes);
  void invalidate(std::uint64_t address, const void* cpu, std::size_t bytes);

  /// The NPU's view of a range; `what` is named in messages.
  std::uint8_t* view(std::uint64_t address, std::size_t bytes, const char* what) const;

  /// Requires that a range is in an allocation, and that `cpu` is where the processor sees it
  /// (null for kDevice).
  void check(std::uint64_t address, const void* cpu, std::size_t bytes, const char* what) const;

  /// The address of the first dirty line that a range touches, or 0.
  std::uint64_t first_dirty(std::uint64_t address, std::size_t bytes) const;

  /// Whether a number is an address of something that is, or was, allocated here.
  bool is_address(std::uint64_t number) const;

 private:
  struct Allocation {
    std::size_t bytes;
    Access access;
    Buffer<std::uint8_t> npu;
    Buffer<std::uint8_t> cpu, met;  ///< for kCached
    const std::uint8_t* cpu_view() const {
      return access == Access::kCached   ? cpu.data()
             : access == Access::kShared ? npu.data()
                                         : nullptr;
    }
  };
  /// Whole lines of an allocation.
  struct Lines {
    std::uint64_t address;  ///< of the allocation
    const Allocation& allocation;
    std::size_t begin, end;

    bool is_dirty(std::size_t line) const;
  };

  Lines lines(std::uint64_t address, const void* const* cpu, std::size_t bytes,
              const char* what) const;

  mutable std::mutex mutex_;
  std::map<std::uint64_t, Allocation> allocations_;  ///< by address
  std::map<std::uint64_t, std::size_t> freed_;       ///< sizes by address
  std::uint64_t next_ = kFirstAddress;

  static constexpr std::uint64_t kFirstAddress = 0x1'4000'0000;
};

}  // namespace edgevl::emulator

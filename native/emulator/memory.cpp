#include "emulator/memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

namespace edgevl::emulator {
namespace {

using Kind = Problem::Kind;

/// Allocations begin at multiples of this, with as much unused between them.
constexpr std::size_t kPage = 4096;
/// Freed allocations that are remembered.
constexpr std::size_t kRemembered = 4096;

std::size_t round_up(std::size_t size, std::size_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

}  // namespace

std::string hex(std::uint64_t number) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(number));
  return text;
}

Memory::Allocated Memory::allocate(std::size_t bytes, std::size_t align, Access access) {
  if (bytes == 0) throw Problem(Kind::kValue, "0 bytes are asked for");
  if (align > 1 << 30 || (align & (align - 1)) != 0) {
    throw Problem(Kind::kValue, "an alignment of " + std::to_string(align) +
                                    " is asked for, which is no power of two, or too large");
  }
  std::lock_guard lock(mutex_);
  const std::uint64_t address = round_up(next_, std::max(align, kPage));
  const std::size_t padded = round_up(bytes, kLineBytes);
  Allocation allocation{bytes, access, Buffer<std::uint8_t>(padded), {}, {}};
  if (access == Access::kCached) {
    allocation.cpu = Buffer<std::uint8_t>(padded);
    allocation.met = Buffer<std::uint8_t>(padded);
  }
  auto* cpu = const_cast<std::uint8_t*>(allocation.cpu_view());
  allocations_.emplace(address, std::move(allocation));
  next_ = round_up(address + bytes, kPage) + kPage;
  return {address, cpu};
}

std::size_t Memory::free(std::uint64_t address, const void* cpu) {
  std::lock_guard lock(mutex_);
  const Lines found = lines(address, &cpu, 0, "the allocation");
  if (found.address != address) {
    throw Problem(Kind::kAddress, hex(address) + " is " + std::to_string(address - found.address) +
                                      " bytes into the allocation at " + hex(found.address));
  }
  const std::size_t bytes = found.allocation.bytes;
  if (freed_.size() == kRemembered) freed_.erase(freed_.begin());
  freed_.emplace(address, bytes);
  allocations_.erase(address);
  return bytes;
}

bool Memory::Lines::is_dirty(std::size_t line) const {
  const auto& a = allocation;
  return std::memcmp(a.cpu.data() + line, a.met.data() + line, kLineBytes) != 0;
}

void Memory::flush(std::uint64_t address, const void* cpu, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  const Lines range = lines(address, &cpu, bytes, "the range");
  const auto& a = range.allocation;
  if (a.access != Access::kCached) return;
  for (std::size_t line = range.begin; line < range.end; line += kLineBytes) {
    if (!range.is_dirty(line)) continue;
    std::memcpy(a.npu.data() + line, a.cpu.data() + line, kLineBytes);
    std::memcpy(a.met.data() + line, a.cpu.data() + line, kLineBytes);
  }
}

void Memory::invalidate(std::uint64_t address, const void* cpu, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  const Lines range = lines(address, &cpu, bytes, "the range");
  const auto& a = range.allocation;
  if (a.access != Access::kCached) return;
  std::uint64_t discarded = 0;
  for (std::size_t line = range.begin; line < range.end && !discarded; line += kLineBytes) {
    if (range.is_dirty(line)) discarded = range.address + line;
  }
  const std::size_t size = range.end - range.begin;
  std::memcpy(a.cpu.data() + range.begin, a.npu.data() + range.begin, size);
  std::memcpy(a.met.data() + range.begin, a.npu.data() + range.begin, size);
  if (discarded) {
    throw Problem(Kind::kDiscarded, "the line at " + hex(discarded) +
                                        " was written and not flushed; what was written is lost");
  }
}

std::uint8_t* Memory::view(std::uint64_t address, std::size_t bytes, const char* what) const {
  std::lock_guard lock(mutex_);
  const Lines range = lines(address, nullptr, bytes, what);
  return range.allocation.npu.data() + (address - range.address);
}

void Memory::check(std::uint64_t address, const void* cpu, std::size_t bytes,
                   const char* what) const {
  std::lock_guard lock(mutex_);
  lines(address, &cpu, bytes, what);
}

std::uint64_t Memory::first_dirty(std::uint64_t address, std::size_t bytes) const {
  std::lock_guard lock(mutex_);
  const Lines range = lines(address, nullptr, bytes, "the range");
  if (range.allocation.access != Access::kCached) return 0;
  for (std::size_t line = range.begin; line < range.end; line += kLineBytes) {
    if (range.is_dirty(line)) return range.address + line;
  }
  return 0;
}

bool Memory::is_address(std::uint64_t number) const {
  std::lock_guard lock(mutex_);
  return number >= kFirstAddress && number < next_;
}

/// Finds the allocation of a range and checks that it holds all of it, and that *cpu, where it is
/// given, is where the processor sees the address.
Memory::Lines Memory::lines(std::uint64_t address, const void* const* cpu, std::size_t bytes,
                            const char* what) const {
  auto at = [&] { return std::string(what) + " at " + hex(address); };
  const auto next = allocations_.upper_bound(address);
  const bool found = next != allocations_.begin() &&
                     address - std::prev(next)->first < std::prev(next)->second.bytes;
  if (!found) {
    const auto freed = freed_.upper_bound(address);
    const bool was =
        freed != freed_.begin() && address - std::prev(freed)->first < std::prev(freed)->second;
    throw Problem(Kind::kAddress, at() + (was ? " has been freed" : " is in no allocation"));
  }
  const auto& [start, allocation] = *std::prev(next);
  const std::size_t offset = address - start;
  if (bytes > allocation.bytes - offset) {
    throw Problem(Kind::kBeyond, at() + " has " + std::to_string(bytes) +
                                     " bytes, but its allocation " + "ends after " +
                                     std::to_string(allocation.bytes - offset));
  }
  const bool is_unseen = cpu && !*cpu && allocation.access == Access::kDevice;
  if (cpu && !is_unseen) {
    const std::uint8_t* view = allocation.cpu_view();
    if (!view || *cpu != view + offset) {
      throw Problem(Kind::kCpuAddress,
                    at() + " is not what the processor sees at " +
                        hex(reinterpret_cast<std::uintptr_t>(*cpu)) + " but at " +
                        hex(view ? reinterpret_cast<std::uintptr_t>(view + offset) : 0));
    }
  }
  return {start, allocation, offset / kLineBytes * kLineBytes,
          round_up(offset + bytes, kLineBytes)};
}

}  // namespace edgevl::emulator

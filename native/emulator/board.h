// The emulated board: its settings, its memory, and what it counts. All libraries share one.

#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>

#include "emulator/counters.h"
#include "emulator/export.h"
#include "emulator/memory.h"
#include "emulator/problem.h"

namespace edgevl::emulator {

/// What the environment says; see read_settings.
struct Settings {
  bool compute = true;  ///< EDGEVL_EMULATOR_COMPUTE: else a run only checks its tensors' places
  bool check = true;    ///< EDGEVL_EMULATOR_CHECK: else processor and NPU share one view of memory
  bool timing = false;  ///< EDGEVL_EMULATOR_TIMING: a run takes the time that its file says
  std::size_t cmm_bytes = std::size_t{4096} << 20;  ///< EDGEVL_EMULATOR_CMM, in MiB
  int threads = 1;  ///< EDGEVL_EMULATOR_THREADS: that compute; default is all processors
  std::chrono::milliseconds load{0};  ///< EDGEVL_EMULATOR_LOAD: that loading a model takes at least
};

/// Reads the environment. Throws Problem for what is not a number, or out of range.
Settings read_settings();

class EDGEVL_EXPORT Board {
 public:
  static Board& get();

  /// Reads the settings anew; everything else stays. From the first time on, the counters are in
  /// the file that EDGEVL_EMULATOR_COUNTERS names, if it does: there they outlive the process.
  void initialize();
  void finalize() { --initialized_; }
  /// Throws Problem unless `initialize` was called.
  void require_initialized() const;

  const Settings& settings() const { return settings_; }
  Memory& memory() { return memory_; }

  /// Allocates from the pool, counting.
  Memory::Allocated allocate(std::size_t bytes, std::size_t align, bool device);
  void free(std::uint64_t address, const void* cpu);
  /// Weights take their part of the pool.
  void take_weights(std::size_t bytes);
  void return_weights(std::size_t bytes);

  /// Adds to a counter.
  void count(std::uint64_t EDGEVL_EMULATOR_COUNTERS::* counter, std::uint64_t amount = 1);
  EDGEVL_EMULATOR_COUNTERS counters() const;
  void reset_counters();
  std::size_t free_bytes() const;

  /// Counts a problem and says it on standard error, each kind once; returns its status.
  std::int32_t report(const char* function, const Problem& problem) noexcept;

 private:
  void check_pool(std::size_t bytes) const;
  void note_peak();
  void share_counters();

  Settings settings_;
  std::atomic<int> initialized_ = 0;  ///< times
  Memory memory_;
  mutable std::mutex mutex_;
  EDGEVL_EMULATOR_COUNTERS own_counters_ = {};
  EDGEVL_EMULATOR_COUNTERS* counters_ = &own_counters_;
  std::set<Problem::Kind> reported_;
};

/// Runs what a function for programs does: counts its time, and turns what it throws into a status.
EDGEVL_EXPORT std::int32_t guarded(const char* function, void (*body)(const void*),
                                   const void* closure) noexcept;

template <class Body>
std::int32_t guarded(const char* function, const Body& body) noexcept {
  // One function that catches, for many that are called.
  return guarded(
      function, [](const void* closure) { (*static_cast<const Body*>(closure))(); }, &body);
}

/// Throws a Problem unless `pointer` is one.
template <class T>
T& required(T* pointer, const char* name) {
  if (!pointer) throw Problem(Problem::Kind::kValue, std::string(name) + " is null");
  return *pointer;
}

}  // namespace edgevl::emulator

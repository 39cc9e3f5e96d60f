#include "emulator/board.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <thread>

namespace edgevl::emulator {
namespace {

using Counters = EDGEVL_EMULATOR_COUNTERS;

/// The number that an environment variable has, or `otherwise` where it is not set or empty.
long number(const char* name, long least, long most, long otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  long value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < least || value > most) {
    throw Problem(Problem::Kind::kSetting,
                  std::string(name) + " is '" + text + "': it must be a number from " +
                      std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

}  // namespace

Settings read_settings() {
  Settings settings;
  settings.compute = number("EDGEVL_EMULATOR_COMPUTE", 0, 1, 1) != 0;
  settings.check = number("EDGEVL_EMULATOR_CHECK", 0, 1, 1) != 0;
  settings.timing = number("EDGEVL_EMULATOR_TIMING", 0, 1, 0) != 0;
  settings.cmm_bytes = static_cast<std::size_t>(number("EDGEVL_EMULATOR_CMM", 1, 1 << 20, 4096))
                       << 20;
  const long processors =
      std::clamp(static_cast<long>(std::thread::hardware_concurrency()), 1L, 256L);
  settings.threads = static_cast<int>(number("EDGEVL_EMULATOR_THREADS", 1, 256, processors));
  settings.load = std::chrono::milliseconds(number("EDGEVL_EMULATOR_LOAD", 0, 60'000, 0));
  return settings;
}

Board& Board::get() {
  // Never destroyed: programs call until the very end.
  static Board& board = *new Board;
  return board;
}

void Board::initialize() {
  settings_ = read_settings();
  share_counters();
  ++initialized_;
}

void Board::share_counters() {
  const char* path = std::getenv("EDGEVL_EMULATOR_COUNTERS");
  std::lock_guard lock(mutex_);
  if (!path || !*path || counters_ != &own_counters_) return;
  const int file = ::open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  void* memory = MAP_FAILED;
  if (file >= 0 && ::ftruncate(file, sizeof(Counters)) == 0) {
    memory = ::mmap(nullptr, sizeof(Counters), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  if (file >= 0) ::close(file);
  if (memory == MAP_FAILED) {
    throw Problem(Problem::Kind::kSetting, std::string("EDGEVL_EMULATOR_COUNTERS is '") + path +
                                               "': the file cannot be written");
  }
  counters_ = new (memory) Counters(own_counters_);
}

void Board::require_initialized() const {
  if (initialized_ < 1) {
    throw Problem(Problem::Kind::kNotInitialized,
                  "the runtime is not initialized: call AX_SYS_Init or axclInit first");
  }
}

Memory::Allocated Board::allocate(std::size_t bytes, std::size_t align, bool device) {
  require_initialized();
  std::lock_guard lock(mutex_);
  check_pool(bytes);
  const auto access = device            ? Memory::Access::kDevice
                      : settings_.check ? Memory::Access::kCached
                                        : Memory::Access::kShared;
  const auto allocated = memory_.allocate(bytes, align, access);
  ++counters_->allocations;
  ++counters_->blocks;
  counters_->cmm_bytes += bytes;
  note_peak();
  return allocated;
}

void Board::free(std::uint64_t address, const void* cpu) {
  const std::size_t bytes = memory_.free(address, cpu);
  std::lock_guard lock(mutex_);
  counters_->cmm_bytes -= bytes;
  --counters_->blocks;
}

void Board::take_weights(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  check_pool(bytes);
  counters_->weight_bytes += bytes;
  ++counters_->models;
  note_peak();
}

void Board::return_weights(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  counters_->weight_bytes -= bytes;
  --counters_->models;
}

void Board::check_pool(std::size_t bytes) const {
  const std::size_t used = counters_->cmm_bytes + counters_->weight_bytes;
  if (used > settings_.cmm_bytes || bytes > settings_.cmm_bytes - used) {
    throw Problem(Problem::Kind::kNoMemory,
                  "of " + std::to_string(settings_.cmm_bytes) + " bytes of CMM, " +
                      std::to_string(used) + " are in use: there is no room for " +
                      std::to_string(bytes) + " more (EDGEVL_EMULATOR_CMM)");
  }
}

std::size_t Board::free_bytes() const {
  std::lock_guard lock(mutex_);
  const std::size_t used = counters_->cmm_bytes + counters_->weight_bytes;
  return settings_.cmm_bytes - std::min(used, settings_.cmm_bytes);
}

void Board::note_peak() {
  counters_->cmm_peak_bytes =
      std::max(counters_->cmm_peak_bytes, counters_->cmm_bytes + counters_->weight_bytes);
}

void Board::count(std::uint64_t Counters::* counter, std::uint64_t amount) {
  std::lock_guard lock(mutex_);
  counters_->*counter += amount;
}

Counters Board::counters() const {
  std::lock_guard lock(mutex_);
  return *counters_;
}

void Board::reset_counters() {
  std::lock_guard lock(mutex_);
  const Counters before = *counters_;
  *counters_ = {};
  counters_->cmm_bytes = before.cmm_bytes;
  counters_->weight_bytes = before.weight_bytes;
  counters_->blocks = before.blocks;
  counters_->models = before.models;
  note_peak();
}

std::int32_t Board::report(const char* function, const Problem& problem) noexcept {
  std::lock_guard lock(mutex_);
  ++counters_->problems;
  if (reported_.insert(problem.kind).second) {
    std::fprintf(stderr, "EdgeVL emulator: %s: %s\n", function, problem.what());
  }
  return problem.status();
}

std::int32_t guarded(const char* function, void (*body)(const void*),
                     const void* closure) noexcept {
  const auto start = std::chrono::steady_clock::now();
  Board& board = Board::get();
  std::int32_t status = 0;
  try {
    body(closure);
  } catch (const Problem& problem) {
    status = board.report(function, problem);
  } catch (const std::bad_alloc&) {
    status = board.report(function, {Problem::Kind::kNoMemory, "this machine's memory is full"});
  } catch (const std::exception& error) {
    status = board.report(function, {Problem::Kind::kOther, error.what()});
  }
  const auto elapsed = std::chrono::steady_clock::now() - start;
  board.count(&Counters::emulator_ns,
              std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  return status;
}

}  // namespace edgevl::emulator

extern "C" {

void EDGEVL_EMULATOR_Counters(EDGEVL_EMULATOR_COUNTERS* counters) {
  if (counters) *counters = edgevl::emulator::Board::get().counters();
}

void EDGEVL_EMULATOR_ResetCounters(void) { edgevl::emulator::Board::get().reset_counters(); }

void EDGEVL_EMULATOR_Memory(uint64_t* free, uint64_t* total) {
  const auto& board = edgevl::emulator::Board::get();
  if (free) *free = board.free_bytes();
  if (total) *total = board.settings().cmm_bytes;
}

}  // extern "C"

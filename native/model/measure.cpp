#include "model/measure.h"

#include <atomic>
#include <chrono>
#include <cstdint>

namespace edgevl {
namespace {

/// Calls work(worker) on all workers at once and returns the seconds until the last is done.
template <class Work>
double seconds(ThreadPool& pool, Work&& work) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point start, end;
  pool.run([&](Worker& worker) {
    worker.barrier();
    if (worker.rank() == 0) start = Clock::now();
    work(worker);
    worker.barrier();
    if (worker.rank() == 0) end = Clock::now();
  });
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

double read_bandwidth(ThreadPool& pool, const Kernels& kernels,
                      const Buffer<std::uint8_t>& memory) {
  constexpr std::size_t kUnit = 256;  // what Kernels::read asks for
  std::atomic<std::uint64_t> everything{0};
  std::atomic<std::size_t> bytes{0};
  const double time = seconds(pool, [&](Worker& worker) {
    const std::size_t share = memory.size() / kUnit / worker.size() * kUnit;
    everything += kernels.read(memory.data() + worker.rank() * share, share);
    bytes += share;
  });
  return static_cast<double>(bytes) / time * 1e-9;
}

double int8_rate(ThreadPool& pool, const Kernels& kernels) {
  std::atomic<std::uint64_t> operations{0};
  const double time = seconds(pool, [&](Worker&) { operations += 2 * kernels.multiply(); });
  return static_cast<double>(operations) / time * 1e-9;
}

}  // namespace edgevl

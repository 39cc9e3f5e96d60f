#include "model/measure.h"

#include <atomic>
#include <chrono>
#include <cstdint>

namespace edgevl {
namespace {

/// Calls work(member) on all members at once and returns the seconds until the last is done.
template <class Work>
double seconds(Team& team, Work&& work) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point start, end;
  team.run([&](Member& member) {
    member.barrier();
    if (member.rank() == 0) start = Clock::now();
    work(member);
    member.barrier();
    if (member.rank() == 0) end = Clock::now();
  });
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

double read_bandwidth(Team& team, const Kernels& kernels, const Buffer<std::uint8_t>& memory) {
  constexpr std::size_t kUnit = 256;  // what Kernels::read asks for
  std::atomic<std::uint64_t> everything{0};
  std::atomic<std::size_t> bytes{0};
  const double time = seconds(team, [&](Member& member) {
    const std::size_t share = memory.size() / kUnit / member.size() * kUnit;
    everything += kernels.read(memory.data() + member.rank() * share, share);
    bytes += share;
  });
  return static_cast<double>(bytes) / time * 1e-9;
}

double int8_rate(Team& team, const Kernels& kernels) {
  std::atomic<std::uint64_t> operations{0};
  const double time = seconds(team, [&](Member&) { operations += 2 * kernels.multiply(); });
  return static_cast<double>(operations) / time * 1e-9;
}

}  // namespace edgevl

#include "threads/thread_pool.h"

#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace edgevl {
namespace {

/// How long a thread spins before it sleeps. Waking a sleeper costs about as much, so that spinning
/// longer would not pay; workers that all run reach a barrier within a few microseconds.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kMaxThreads = 256;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  asm volatile("yield");
#endif
}

/// Waits until the value is not `old` any more.
void wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  constexpr int kPausesPerLook = 64;  // reading the clock costs more than a pause
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

}  // namespace

struct ThreadPool::State {
  /// Item of a worker's share that the next claim gets.
  struct alignas(64) Next {
    std::atomic<int> item{0};
  };

  // Each counter has a cache line of its own: workers spin on one while others write the next.
  alignas(64) std::atomic<int> arrived{0};            ///< workers at the current barrier
  alignas(64) std::atomic<std::uint32_t> passed{0};   ///< barriers passed; wraps around
  alignas(64) std::atomic<std::uint32_t> started{0};  ///< steps started; wraps around

  alignas(64) int size = 1;
  std::vector<Next> next;  ///< of each worker
  long process = process_id();
  std::mutex turn;                                     ///< held by the caller whose step runs
  const std::function<void(Worker&)>* step = nullptr;  ///< null: leave
  std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<std::thread> threads;

  void run_step(Worker& worker) {
    try {
      (*step)(worker);
    } catch (...) {
      std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    worker.barrier();
  }

  void start(const std::function<void(Worker&)>* next_step) {
    step = next_step;
    started.fetch_add(1, std::memory_order_release);
    started.notify_all();
  }

  void work(Worker worker) {
    for (std::uint32_t seen = 0;; ++seen) {
      wait_for_change(started, seen);
      if (!step) return;
      run_step(worker);
    }
  }

  void stop() {
    start(nullptr);
    for (auto& thread : threads) thread.join();
  }
};

/// Returns the next item of a worker's share of `count`; from `count` on if there is none.
int Worker::claim(int rank, int count) {
  auto& item = pool_.state_->next[rank].item;
  // Of shares that are through the line is only read: it stays where it is.
  if (item.load(std::memory_order_relaxed) >= count) return count;
  return item.fetch_add(1, std::memory_order_relaxed);
}

Worker::Range Worker::share(int n, int rank) const {
  auto edge = [&](int r) { return static_cast<int>(static_cast<long long>(n) * r / size_); };
  return {edge(rank), edge(rank + 1)};
}

void Worker::barrier() {
  auto& state = *pool_.state_;
  const std::uint32_t passed = state.passed.load(std::memory_order_relaxed);
  if (state.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size_) {
    wait_for_change(state.passed, passed);
    return;
  }
  // Nobody claims or arrives while the others wait for the last one.
  for (auto& next : state.next) next.item.store(0, std::memory_order_relaxed);
  state.arrived.store(0, std::memory_order_relaxed);
  state.passed.fetch_add(1, std::memory_order_release);
  state.passed.notify_all();
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ": give 1 to " +
                                std::to_string(kMaxThreads));
  }
  state_ = std::make_unique<State>();
  state_->size = threads;
  state_->next = std::vector<State::Next>(threads);
  try {
    for (int rank = 1; rank < threads; ++rank) {
      state_->threads.emplace_back(&State::work, state_.get(), Worker(*this, rank, threads));
    }
  } catch (...) {  // the system has no more threads
    state_->stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (state_->process != process_id()) {
    state_
        .release();  // a fork's child: the threads to join, and so their objects, are the parent's
    return;
  }
  state_->stop();
}

int ThreadPool::size() const { return state_->size; }

void ThreadPool::run(const std::function<void(Worker&)>& step) {
  auto& state = *state_;
  if (state.process != process_id()) {
    throw std::runtime_error("threads do not survive a fork: load the model in the child process");
  }
  std::lock_guard lock(state.turn);
  state.error = nullptr;
  Worker caller(*this, 0, state.size);
  if (state.size == 1) {
    state.step = &step;
  } else {
    state.start(&step);
  }
  state.run_step(caller);
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace edgevl

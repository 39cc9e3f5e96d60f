// Threads that walk through a forward pass together.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace edgevl {

class ThreadPool;

/// One thread's place in a running step. Every worker of the pool calls the same functions in the
/// same order.
class Worker {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Waits until every worker is here; what they wrote before is seen after.
  void barrier();

  /// This worker's part [begin, end) of n items, contiguous and the same in every call.
  struct Range {
    int begin, end;
  };
  Range share(int n) const;

  /// Calls body(i) once for every i in [0, n), each on whichever worker is free; then a barrier.
  template <class Body>
  void each(int n, Body&& body) {
    for (int i; (i = claim()) < n;) body(i);
    barrier();
  }

 private:
  friend class ThreadPool;
  Worker(ThreadPool& pool, int rank, int size) : pool_(pool), rank_(rank), size_(size) {}
  int claim();

  ThreadPool& pool_;
  int rank_, size_;
};

/// A fixed number of threads, the caller's among them. They spin for a moment between steps and
/// sleep after that, so that an idle model costs nothing. One step runs at a time; a second caller
/// waits. An exception thrown by a body is rethrown by run, once, after all workers have left: so a
/// body must not throw between barriers unless every worker does.
class ThreadPool {
 public:
  /// Throws std::invalid_argument unless 1 <= threads <= 256.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;
  void run(const std::function<void(Worker&)>& step);

 private:
  friend class Worker;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgevl

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
  Range share(int n) const { return share(n, rank_); }

  /// Calls body(i) once for every i in [0, n); then a barrier. A worker goes through its share, and
  /// then takes from those of others who are not through: so what it reads is mostly contiguous.
  template <class Body>
  void each(int n, Body&& body) {
    for (int other = 0; other < size_; ++other) {
      const int rank = (rank_ + other) % size_;
      const auto [begin, end] = share(n, rank);
      for (int i; (i = begin + claim(rank, end - begin)) < end;) body(i);
    }
    barrier();
  }

 private:
  friend class ThreadPool;
  Worker(ThreadPool& pool, int rank, int size) : pool_(pool), rank_(rank), size_(size) {}
  Range share(int n, int rank) const;
  int claim(int rank, int count);

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

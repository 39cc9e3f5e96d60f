// Threads that walk through a forward pass together.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace edgevl {

class Team;

/// One thread's place in a running step. Every member of the team calls the same functions in the
/// same order.
class Member {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Waits until every member is here; what they wrote before is seen after.
  void barrier();

  /// This member's part [begin, end) of n items, contiguous and the same in every call.
  struct Range {
    int begin, end;
  };
  Range share(int n) const;

  /// Calls body(i) once for every i in [0, n), each on whichever member is free; then a barrier.
  template <class Body>
  void each(int n, Body&& body) {
    for (int i; (i = claim()) < n;) body(i);
    barrier();
  }

 private:
  friend class Team;
  Member(Team& team, int rank, int size) : team_(team), rank_(rank), size_(size) {}
  int claim();

  Team& team_;
  int rank_, size_;
};

/// A fixed number of threads, the caller's among them. They spin for a moment between steps and
/// sleep after that, so that an idle model costs nothing. One step runs at a time; a second caller
/// waits. An exception thrown by a body is rethrown by run, once, after all members have left: so a
/// body must not throw between barriers unless every member does.
class Team {
 public:
  /// Throws std::invalid_argument unless 1 <= threads <= 256.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;
  void run(const std::function<void(Member&)>& step);

 private:
  friend class Member;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgevl

#include "model/head.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace edgevl {
namespace {

using Candidate = std::pair<float, int>;

/// Larger logits first, of equal ones the smaller id: the same whatever the number of threads.
bool better(const Candidate& a, const Candidate& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

/// Puts the best of logits[begin .. end) into `best`; fills up with -infinity, id -1.
void find_best(const float* logits, int begin, int end, Candidate* best) {
  constexpr int kRun = 32;  // compared as one with the worst of the best so far
  std::fill_n(best, kRescored, Candidate{-std::numeric_limits<float>::infinity(), -1});
  for (int first = begin; first < end; first += kRun) {
    const int last = std::min(first + kRun, end);
    bool any = false;
    for (int i = first; i < last; ++i) any |= logits[i] > best[0].first;
    if (!any) continue;
    for (int i = first; i < last; ++i) {
      if (!(logits[i] > best[0].first)) continue;
      std::pop_heap(best, best + kRescored, better);  // a heap with the worst on top
      best[kRescored - 1] = {logits[i], i};
      std::push_heap(best, best + kRescored, better);
    }
  }
}

}  // namespace

Head::Head(const Kernels& kernels, Norm norm, Linear linear, std::optional<Rows> exact,
           int vocabulary, int hidden, int workers)
    : kernels_(kernels),
      norm_(norm),
      linear_(linear),
      exact_(std::move(exact)),
      vocabulary_(vocabulary),
      hidden_(hidden),
      workers_(workers),
      merged_(workers, std::vector<Candidate>(static_cast<std::size_t>(workers) * kRescored)) {
  for (int i = 0; i < workers; ++i) normed_.emplace_back(3 * static_cast<std::size_t>(hidden));
}

void Head::reserve(int rows) {
  const std::size_t size = static_cast<std::size_t>(rows) * workers_ * kRescored;
  if (exact_ && candidates_.size() < size) candidates_.resize(size);
}

void Head::run(Worker& worker, Gemm& gemm, const Hidden& hidden, float* logits) {
  const auto stride = static_cast<std::size_t>(vocabulary_);
  gemm.run(worker, linear_, {hidden.rows, hidden.stride, hidden.count, hidden_, norm_},
           {Epilogue::Kind::kStore, logits, stride, vocabulary_});
  if (!exact_) return;
  find_candidates(worker, hidden.count, logits);
  worker.barrier();
  rescore(worker, hidden, logits);
}

void Head::find_candidates(Worker& worker, int rows, const float* logits) {
  const auto [begin, end] = worker.share(vocabulary_);
  for (int row = 0; row < rows; ++row) {
    find_best(logits + static_cast<std::size_t>(row) * vocabulary_, begin, end,
              candidates(row, worker.rank()));
  }
}

void Head::rescore(Worker& worker, const Hidden& hidden, float* logits) {
  auto& merged = merged_[worker.rank()];
  float* x = normed_[worker.rank()].data();
  for (int row = 0; row < hidden.count; ++row) {
    norm_.apply(kernels_, hidden.rows + row * hidden.stride, hidden_, x);
    std::copy_n(candidates(row, 0), merged.size(), merged.begin());
    std::nth_element(merged.begin(), merged.begin() + kRescored - 1, merged.end(), better);
    const auto [begin, end] = worker.share(kRescored);
    for (int i = begin; i < end; ++i) {
      const int token = merged[i].second;
      if (token < 0) continue;
      logits[static_cast<std::size_t>(row) * vocabulary_ + token] = exact_logit(token, x);
    }
  }
}

/// x is a worker's normed_.
float Head::exact_logit(int token, float* x) const {
  float *weights = x + hidden_, *buffer = weights + hidden_;
  if (exact_->dtype() == Dtype::kBf16) {
    const auto* row = static_cast<const std::uint16_t*>(exact_->stored(token, buffer));
    return kernels_.dot_bf16(row, x, hidden_);
  }
  exact_->row(token, weights, buffer);
  float sum = 0;
  for (int i = 0; i < hidden_; ++i) sum += weights[i] * x[i];
  return sum;
}

}  // namespace edgevl

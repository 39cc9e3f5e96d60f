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

/// Puts the best of some tokens into `best`; fills up with -infinity, id -1.
void find_best(const float* logits, const std::vector<int>& tokens, Candidate* best) {
  std::fill_n(best, kRescored, Candidate{-std::numeric_limits<float>::infinity(), -1});
  for (int token : tokens) {
    if (!(logits[token] > best[0].first)) continue;
    std::pop_heap(best, best + kRescored, better);  // a heap with the worst on top
    best[kRescored - 1] = {logits[token], token};
    std::push_heap(best, best + kRescored, better);
  }
}

/// Brings the lower parts of a row.
void fetch_lower(const Matrix& matrix, int row) {
  const std::uint8_t* lower = matrix.lower(row);
  for (std::size_t at = 0; at < matrix.lower_bytes(); at += kLineBytes) {
    __builtin_prefetch(lower + at);
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
      order_(workers),
      refined_(workers),
      merged_(workers, std::vector<Candidate>(static_cast<std::size_t>(workers) * kRescored)) {
  for (int i = 0; i < workers; ++i) normed_.emplace_back(3 * static_cast<std::size_t>(hidden));
}

bool Head::finds_candidates() const { return exact_ || linear_.matrix.format == Format::kSplit; }

void Head::reserve(int rows) {
  const auto count = static_cast<std::size_t>(rows);
  if (!finds_candidates() || least_.size() >= count) return;
  largest_.resize(count * sets());
  candidates_.resize(count * workers_ * kRescored);
  // Workers must not run out of memory between barriers.
  for (auto& order : order_) order.reserve(sets());
  for (auto& tokens : refined_) tokens.reserve((sets() / workers_ + 1) * kSet);
  least_.resize(count);  // the last, as it says that there is room for all
}

void Head::run(Worker& worker, Gemm& gemm, const Hidden& hidden, float* logits) {
  const auto stride = static_cast<std::size_t>(vocabulary_);
  gemm.run(worker, linear_, {hidden.rows, hidden.stride, hidden.count, hidden_, norm_},
           {Epilogue::Kind::kStore, logits, stride, vocabulary_});
  if (!finds_candidates()) return;
  find_least(worker, hidden.count, logits);
  find_candidates(worker, hidden, logits);
  if (!exact_) return;
  worker.barrier();
  rescore(worker, hidden, logits);
}

/// Finds how large the logits of a row must be that there are kRefined of them, and somewhat more.
void Head::find_least(Worker& worker, int rows, const float* logits) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const auto [begin, end] = worker.share(sets());
  for (int row = 0; row < rows; ++row, logits += vocabulary_) {
    for (int set = begin; set < end; ++set) {
      const int first = set * kSet;
      const float found = kernels_.largest(logits + first, std::min(kSet, vocabulary_ - first));
      largest(row)[set] = found > kLowest ? found : kLowest;  // nor is it NaN
    }
  }
  worker.barrier();
  worker.each(rows, [&](int row) {
    least_[row] = kLowest;
    if (sets() <= kRefined) return;
    auto& order = order_[worker.rank()];
    order.assign(largest(row), largest(row) + sets());
    const auto last = order.begin() + kRefined - 1;
    std::nth_element(order.begin(), last, order.end(), std::greater<>());
    least_[row] = *last;
  });
}

/// Computes the large logits of this worker's share from both parts of the matrix, and finds the
/// best of them.
void Head::find_candidates(Worker& worker, const Hidden& hidden, float* logits) {
  constexpr std::size_t kAhead = 8;  // rows, which are far apart
  const Matrix& matrix = linear_.matrix;
  const auto [begin, end] = worker.share(sets());
  float* x = normed_[worker.rank()].data();
  auto& tokens = refined_[worker.rank()];
  for (int row = 0; row < hidden.count; ++row, logits += vocabulary_) {
    tokens.clear();
    for (int set = begin; set < end; ++set) {
      if (largest(row)[set] < least_[row]) continue;
      const int first = set * kSet, last = std::min(first + kSet, vocabulary_);
      for (int token = first; token < last; ++token) {
        if (logits[token] >= least_[row]) tokens.push_back(token);
      }
    }
    if (matrix.format == Format::kSplit) {
      norm_.apply(kernels_, hidden.rows + row * hidden.stride, hidden_, x);
      for (std::size_t i = 0; i < tokens.size() + kAhead; ++i) {
        if (i < tokens.size()) fetch_lower(matrix, tokens[i]);
        if (i < kAhead) continue;
        const int token = tokens[i - kAhead];
        logits[token] += kernels_.lower(matrix, token, x, hidden_);
      }
    }
    find_best(logits, tokens, candidates(row, worker.rank()));
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

// The output layer: hidden states to logits.

#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "model/linear.h"
#include "model/rows.h"
#include "threads/thread_pool.h"

namespace edgevl {

/// Candidates of a row whose logits are computed again from the original weights.
constexpr int kRescored = 64;

/// At least so many candidates of a row are computed again from both parts of a matrix.
constexpr int kRefined = 512;

/// Final norm and output layer.
///
/// The output layer is a large part of what a token reads, so it is the matrix that gains most from
/// few bits; and the one where their error is seen, as it falls straight on the logits. Both are
/// had where only what matters is computed well. Of a matrix in two parts (Format::kSplit) the
/// upper one gives all logits of a row, and the lower one is added to the kRefined largest and
/// more. With the original rows at hand the kRescored largest are then computed again exactly, in
/// float32. The largest logit is that of the original weights unless the upper part misplaces it by
/// more than kRefined ranks, or both together by more than kRescored; what a sampler draws from is
/// nearly all among the candidates.
class Head {
 public:
  /// `exact` is [vocabulary, hidden] or nothing.
  Head(const Kernels& kernels, Norm norm, Linear linear, std::optional<Rows> exact, int vocabulary,
       int hidden, int workers);

  /// Makes room for `rows` rows; before `run`, not in it.
  void reserve(int rows);

  struct Hidden {
    const float* rows;   ///< [count, hidden]
    std::size_t stride;  ///< floats from row to row
    int count;
  };

  /// Hidden states to logits [count, vocabulary]. All workers call it alike, and as the last of a
  /// step: after its last barrier, some of them may throw FileError.
  void run(Worker& worker, Gemm& gemm, const Hidden& hidden, float* logits);

 private:
  using Candidate = std::pair<float, int>;  ///< logit, token id
  /// Logits of which only the largest is looked at first.
  static constexpr int kSet = 64;

  bool finds_candidates() const;
  void find_least(Worker& worker, int rows, const float* logits);
  int sets() const { return (vocabulary_ + kSet - 1) / kSet; }
  void find_candidates(Worker& worker, const Hidden& hidden, float* logits);
  void rescore(Worker& worker, const Hidden& hidden, float* logits);
  float exact_logit(int token, float* x) const;
  float* largest(int row) { return largest_.data() + static_cast<std::size_t>(row) * sets(); }
  Candidate* candidates(int row, int rank) {
    return candidates_.data() + (static_cast<std::size_t>(row) * workers_ + rank) * kRescored;
  }

  const Kernels& kernels_;
  Norm norm_;
  Linear linear_;
  std::optional<Rows> exact_;
  int vocabulary_, hidden_, workers_;
  std::vector<float> largest_;                  ///< [rows][sets]
  std::vector<float> least_;                    ///< [rows] the least logit that is refined
  std::vector<Candidate> candidates_;           ///< [rows][workers][kRescored]
  std::vector<std::vector<float>> order_;       ///< for each worker, `largest_` of a row
  std::vector<std::vector<int>> refined_;       ///< for each worker, its tokens of a row
  std::vector<std::vector<Candidate>> merged_;  ///< for each worker
  /// For each worker: the row; a row of weights; and as it is stored.
  std::vector<Buffer<float>> normed_;
};

}  // namespace edgevl

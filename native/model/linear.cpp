#include "model/linear.h"

#include <algorithm>

namespace edgevl {
namespace {

constexpr int kPair = 2 * kLanes;  ///< output columns of a tile

int blocks_of(int tokens, int size) { return (tokens + size - 1) / size; }

}  // namespace

void Norm::apply(const Kernels& kernels, const float* x, int cols, float* out) const {
  if (bias) {
    kernels.layer_norm(x, weight, bias, cols, eps, out);
  } else {
    kernels.rms_norm(x, weight, cols, eps, out);
  }
}

Products::Products(const Kernels& kernels, int members, int tokens)
    : kernels_(kernels), tokens_(tokens), own_(members), normed_(members) {}

void Products::fit(const Matrix& matrix) {
  const std::size_t words = matrix.cols / (matrix.format == Format::kBf16 ? 2 : 4);
  const std::size_t block = kernels_.token_block;
  const std::size_t all = blocks_of(tokens_, kernels_.token_block) * block;
  cols_ = std::max<std::size_t>(cols_, matrix.cols);
  words_ = std::max(words_, words);
  groups_ = std::max<std::size_t>(groups_, matrix.groups());
  auto reserve = [&](Blocks& blocks, std::size_t tokens) {
    blocks.words.reserve(tokens * words_);
    blocks.scales.reserve(tokens * groups_);
    blocks.sums.reserve(tokens * groups_);
  };
  reserve(shared_, all);
  for (auto& own : own_) reserve(own, block);
  for (auto& normed : normed_) normed.reserve(block * cols_);
}

void Products::run(Member& member, const Linear& linear, const Input& input, const Output& output) {
  const Matrix& matrix = linear.matrix;
  const int format = static_cast<int>(matrix.format);
  const int size = kernels_.token_block;
  const int blocks = blocks_of(input.tokens, size);
  const int pairs = matrix.panels() / 2;
  float* normed = normed_[member.rank()].data();

  // A single block is quicker made by every member for itself than by one for all.
  Blocks& x = blocks == 1 ? own_[member.rank()] : shared_;
  if (blocks == 1) {
    prepare(matrix, input, 0, x, normed);
  } else {
    member.each(blocks, [&](int index) { prepare(matrix, input, index, x, normed); });
  }

  alignas(kLineBytes) float tile[kMaxTokenBlock * kPair];
  if (input.tokens == 1) {
    const Block token = block(x, matrix, 0, 1);
    const auto [begin, end] = member.share(pairs);
    for (int pair = begin; pair < end; ++pair) {
      kernels_.row[format](matrix, matrix.panel(2 * pair), token, tile);
      kernels_.row[format](matrix, matrix.panel(2 * pair + 1), token, tile + kLanes);
      finish(linear, output, pair, 0, 1, tile);
    }
    member.barrier();
    return;
  }
  member.each(pairs, [&](int pair) {
    for (int index = 0; index < blocks; ++index) {
      const int first = index * size;
      const int tokens = std::min(size, input.tokens - first);
      kernels_.tile[format](matrix, matrix.panel(2 * pair), block(x, matrix, index, tokens), tile);
      finish(linear, output, pair, first, tokens, tile);
    }
  });
}

Block Products::block(Blocks& blocks, const Matrix& matrix, int index, int tokens) const {
  const std::size_t first = static_cast<std::size_t>(index) * kernels_.token_block;
  return {tokens,
          matrix.cols,
          matrix.group,
          blocks.words.data() + first * words_,
          blocks.scales.data() + first * groups_,
          blocks.sums.data() + first * groups_};
}

void Products::prepare(const Matrix& matrix, const Input& input, int index, Blocks& blocks,
                       float* normed) {
  const int first = index * kernels_.token_block;
  const int tokens = std::min(kernels_.token_block, input.tokens - first);
  const float* rows = input.rows + first * input.stride;
  std::size_t stride = input.stride;
  if (input.norm.weight) {
    for (int t = 0; t < tokens; ++t) {
      input.norm.apply(kernels_, rows + t * stride, input.cols, normed + t * cols_);
    }
    rows = normed;
    stride = cols_;
  }
  const auto convert = matrix.format == Format::kBf16 ? kernels_.round : kernels_.quantize;
  convert(rows, stride, input.cols, block(blocks, matrix, index, tokens));
}

void Products::finish(const Linear& linear, const Output& output, int pair, int first, int tokens,
                      float* tile) const {
  const int column = pair * kPair;
  if (linear.bias) {
    const int width = std::min(kPair, linear.matrix.rows - column);
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < width; ++c) tile[t * kPair + c] += linear.bias[column + c];
    }
  }
  if (output.kind == Output::Kind::kSwiglu) {
    const int width = std::min(kLanes, output.cols - column / 2);
    for (int t = 0; t < tokens; ++t) {
      const float* gate = tile + t * kPair;
      kernels_.swiglu(gate, gate + kLanes, width,
                      output.rows + (first + t) * output.stride + column / 2);
    }
    return;
  }
  if (output.kind == Output::Kind::kGelu) kernels_.gelu(tile, tokens * kPair);
  const int width = std::min(kPair, output.cols - column);
  for (int t = 0; t < tokens; ++t) {
    const float* y = tile + t * kPair;
    float* out = output.rows + (first + t) * output.stride + column;
    if (output.kind == Output::Kind::kAdd) {
      kernels_.add(out, y, output.scale ? output.scale + column : nullptr, width);
    } else {
      std::copy_n(y, width, out);
    }
  }
}

}  // namespace edgevl

#include "model/linear.h"

#include <algorithm>
#include <numeric>

namespace edgevl {
namespace {

constexpr int kPair = 2 * kLanes;  ///< rows of a pair of panels

/// Output columns of a pair of panels.
constexpr int columns(Epilogue::Kind kind) {
  return kind == Epilogue::Kind::kSwiglu ? kLanes : kPair;
}

}  // namespace

void Norm::apply(const Kernels& kernels, const float* x, int cols, float* out) const {
  if (bias) {
    kernels.layer_norm(x, weight, bias, cols, eps, out);
  } else {
    kernels.rms_norm(x, weight, cols, eps, out);
  }
}

Gemm::Gemm(const Kernels& kernels, int workers, int tokens)
    : kernels_(kernels), tokens_(tokens), own_(workers) {}

void Gemm::fit(const Matrix& matrix) {
  const std::size_t words = matrix.cols / (matrix.format == Format::kBf16 ? 2 : 4);
  const std::size_t block = kernels_.token_block;
  cols_ = std::max<std::size_t>(cols_, matrix.cols);
  words_ = std::max(words_, words);
  groups_ = std::max<std::size_t>(groups_, matrix.groups());
  auto reserve = [&](Blocks& blocks, std::size_t tokens) {
    blocks.words.reserve(tokens * words_);
    blocks.scales.reserve(tokens * groups_);
    blocks.sums.reserve(tokens * groups_);
  };
  reserve(shared_, blocks_of(tokens_) * block);
  for (auto& own : own_) {
    reserve(own.block, block);
    own.normed.reserve(block * cols_);
    own.inner.reserve(tokens_ * unit_);
  }
  if (unit_ == 0) return;
  reserve(activated_, blocks_of(tokens_) * block);
  row_.reserve(cols_);
}

void Gemm::fit_second(const Matrix& matrix) {
  unit_ = std::max<std::size_t>(unit_, unit_of(matrix));
  fit(matrix);
}

void Gemm::run(Worker& worker, const Linear& linear, const Input& input, const Output& output) {
  multiply(worker, linear, prepare(worker, linear.matrix, input), input.tokens, output);
}

void Gemm::run(Worker& worker, const Mlp& mlp, const Input& input, const Output& output) {
  if (input.tokens == 1) {
    const auto cols = static_cast<std::size_t>(mlp.inner);
    run(worker, mlp.first, input, {mlp.activation, row_.data(), cols, mlp.inner});
    run(worker, mlp.second, {row_.data(), cols, 1, mlp.inner}, output);
    return;
  }
  const Blocks& x = prepare(worker, mlp.first.matrix, input);
  const int unit = unit_of(mlp.second.matrix), blocks = blocks_of(input.tokens);
  const int units = (mlp.inner + unit - 1) / unit;
  // Where there are few units, tokens are divided too, so that every worker has its share.
  constexpr int kItems = 8;  // for each worker
  const int parts = std::clamp(kItems * worker.size() / units, 1, blocks);
  worker.each(units * parts, [&](int item) {
    const int part = item % parts;
    const Range range{blocks * part / parts, blocks * (part + 1) / parts, input.tokens};
    activate(worker, mlp, x, range, item / parts);
  });
  multiply(worker, mlp.second, activated_, input.tokens, output);
}

int Gemm::blocks_of(int tokens) const {
  return (tokens + kernels_.token_block - 1) / kernels_.token_block;
}

/// Columns of an MLP's inner activations that one item computes: whole groups and whole tiles.
int Gemm::unit_of(const Matrix& matrix) {
  constexpr int kBf16Unit = 128;  // has no groups
  return matrix.format == Format::kBf16 ? kBf16Unit : std::lcm(matrix.group, kPair);
}

Block Gemm::block(const Blocks& blocks, const Matrix& matrix, int index, int tokens) const {
  const std::size_t first = static_cast<std::size_t>(index) * kernels_.token_block;
  return {tokens,
          matrix.cols,
          matrix.group,
          blocks.words.data() + first * words_,
          blocks.scales.data() + first * groups_,
          blocks.sums.data() + first * groups_};
}

/// Returns the input, normed and converted.
const Gemm::Blocks& Gemm::prepare(Worker& worker, const Matrix& matrix, const Input& input) {
  // A single block is quicker made by every worker for itself than by one for all.
  if (input.tokens <= kernels_.token_block) {
    const Blocks& blocks = own_[worker.rank()].block;
    prepare_block(worker, matrix, input, 0, blocks);
    return blocks;
  }
  worker.each(blocks_of(input.tokens),
              [&](int index) { prepare_block(worker, matrix, input, index, shared_); });
  return shared_;
}

void Gemm::prepare_block(Worker& worker, const Matrix& matrix, const Input& input, int index,
                         const Blocks& blocks) {
  const int first = index * kernels_.token_block;
  const int tokens = std::min(kernels_.token_block, input.tokens - first);
  const float* rows = input.rows + first * input.stride;
  std::size_t stride = input.stride;
  if (input.norm.weight) {
    float* normed = own_[worker.rank()].normed.data();
    for (int t = 0; t < tokens; ++t) {
      input.norm.apply(kernels_, rows + t * stride, input.cols, normed + t * cols_);
    }
    rows = normed;
    stride = cols_;
  }
  const auto convert = matrix.format == Format::kBf16 ? kernels_.round : kernels_.quantize;
  convert(rows, stride, input.cols, block(blocks, matrix, index, tokens));
}

void Gemm::multiply(Worker& worker, const Linear& linear, const Blocks& x, int tokens,
                    const Output& output) const {
  const Matrix& matrix = linear.matrix;
  const int pairs = matrix.panels() / 2;
  if (tokens > 1) {
    const Range all{0, blocks_of(tokens), tokens};
    worker.each(pairs, [&](int pair) { multiply_pair(linear, x, all, pair, output); });
    return;
  }
  const auto row = kernels_.row[static_cast<int>(matrix.format)];
  const Block token = block(x, matrix, 0, 1);
  worker.each(pairs, [&](int pair) {
    alignas(kLineBytes) float tile[kPair];
    row(matrix, matrix.panel(2 * pair), token, tile);
    row(matrix, matrix.panel(2 * pair + 1), token, tile + kLanes);
    apply_epilogue(tile, 1, linear, pair, 0, output);
  });
}

/// Two panels times some blocks.
void Gemm::multiply_pair(const Linear& linear, const Blocks& x, const Range& range, int pair,
                         const Output& output) const {
  const Matrix& matrix = linear.matrix;
  const auto product = kernels_.tile[static_cast<int>(matrix.format)];
  alignas(kLineBytes) float tile[kMaxTokenBlock * kPair];
  for (int index = range.begin; index < range.end; ++index) {
    const int first = index * kernels_.token_block;
    const int count = std::min(kernels_.token_block, range.tokens - first);
    fetch_output(pair, first, count, output);
    product(matrix, matrix.panel(2 * pair), block(x, matrix, index, count), tile);
    apply_epilogue(tile, count, linear, pair, first, output);
  }
}

/// Brings the lines that a tile will be put into: they are far apart, and a processor does not see
/// them coming.
void Gemm::fetch_output(int pair, int first, int tokens, const Output& output) {
  const int column = pair * columns(output.kind) - output.begin;
  const float* rows = output.rows + first * output.stride + column;
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < columns(output.kind); c += kLanes) {
      __builtin_prefetch(rows + t * output.stride + c, 1);
    }
  }
}

void Gemm::apply_epilogue(const float* tile, int tokens, const Linear& linear, int pair, int first,
                          const Output& output) const {
  const int column = pair * columns(output.kind);
  const int width = std::min(columns(output.kind), output.cols - column);
  if (width <= 0) return;  // all of it is padding
  kernels_.apply_epilogue(
      tile, tokens,
      {output.kind, linear.bias ? linear.bias + pair * kPair : nullptr,
       output.scale ? output.scale + column : nullptr,
       output.rows + first * output.stride + (column - output.begin), output.stride, width});
}

/// One unit of the inner activations of some blocks: computed, and converted for the second layer.
void Gemm::activate(Worker& worker, const Mlp& mlp, const Blocks& x, const Range& range, int unit) {
  const Matrix& matrix = mlp.second.matrix;
  const int size = unit_of(matrix), begin = unit * size;
  const int end = std::min(begin + size, mlp.inner);
  const auto stride = static_cast<std::size_t>(size);
  float* inner = own_[worker.rank()].inner.data();
  const Output output{mlp.activation, inner, stride, end, nullptr, begin};
  const int width = columns(mlp.activation);
  for (int pair = begin / width; pair * width < end; ++pair) {
    multiply_pair(mlp.first, x, range, pair, output);
  }
  const bool bf16 = matrix.format == Format::kBf16;
  const std::size_t words = begin / (bf16 ? 2 : 4), groups = bf16 ? 0 : begin / matrix.group;
  for (int index = range.begin; index < range.end; ++index) {
    const int first = index * kernels_.token_block;
    Block part =
        block(activated_, matrix, index, std::min(kernels_.token_block, range.tokens - first));
    part.cols = std::min(size, matrix.cols - begin);
    part.words += words * part.tokens;
    part.scales += groups * part.tokens;
    part.sums += groups * part.tokens;
    (bf16 ? kernels_.round : kernels_.quantize)(inner + first * stride, stride, end - begin, part);
  }
}

}  // namespace edgevl

// How a model's configuration and weights are checked.

#pragma once

#include <stdexcept>
#include <string>

#include "model/linear.h"
#include "model/pack.h"

namespace edgevl {

/// Throws std::invalid_argument with the message unless the condition holds.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

/// Requires that a layer's packed matrix stands for [rows, cols], and a product for all of it, or
/// else, `in_parts`, that somebody adds what the lower part does.
inline void check_matrix(const Linear& linear, const std::string& name, int rows, int cols,
                         bool in_parts = false) {
  const Matrix& m = linear.matrix;
  require(in_parts || m.format != Format::kSplit, name + " is in two parts");
  const int padded = describe(m.format, rows, cols, m.group).cols;
  require(m.data && m.rows == rows && m.cols == padded,
          name + " is " + std::to_string(m.rows) + " x " + std::to_string(m.cols) + ", expected " +
              std::to_string(rows) + " x " + std::to_string(padded));
}

}  // namespace edgevl

// Model files of the emulator, as src/edgevl/boards/emulate.py writes them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/export.h"
#include "model/linear.h"

namespace edgevl::emulator {

enum class Type : std::uint8_t { kU8, kI32, kU32, kBf16, kF32 };

/// An input or output.
struct EDGEVL_EXPORT TensorInfo {
  std::string name;
  Type type;
  std::vector<std::int32_t> shape;

  std::size_t bytes() const;
  bool operator==(const TensorInfo&) const = default;
};

/// The shapes of one run.
struct Group {
  double ms;  ///< on the board, as published or computed
  std::vector<TensorInfo> inputs, outputs;
};

/// A model as its file describes it. The file begins with lines of words:
///
///     edgevl emulated axmodel
///     kind layer
///     number hidden_size 128 ...
///     group MS
///     input NAME TYPE SIZE ...           of the last group
///     output NAME TYPE SIZE ...
///     matrix NAME ROWS COLS OFFSET       packed as bfloat16, see kernels/layout.h
///     vector NAME SIZE OFFSET            float32
///     end
///
/// Offsets are multiples of 64 from the beginning of the file, which the data is part of.
class ModelFile {
 public:
  /// Reads the header. Weights are pointed to: who computes with them has `data` begin at a
  /// multiple of 64 bytes and outlive the use. Throws Problem for a file that is
  /// damaged or not the emulator's.
  explicit ModelFile(std::span<const std::uint8_t> data);

  const std::string& kind() const { return kind_; }
  const std::vector<Group>& groups() const { return groups_; }
  /// Of matrices and vectors.
  std::size_t weight_bytes() const { return weight_bytes_; }

  /// Parts of it by name. Throw Problem for what is missing or not as it is asked for.
  const std::vector<double>& numbers(const std::string& name, std::size_t count) const;
  int integer(const std::string& name) const;
  const float* vector(const std::string& name, std::size_t size) const;
  /// The same, or null where there is none.
  const float* optional_vector(const std::string& name, std::size_t size) const;
  /// A vector of rows * cols numbers.
  const float* rows(const std::string& name, std::size_t rows, std::size_t cols) const {
    return vector(name, rows * cols);
  }
  /// A matrix, with the bias NAME_bias if there is one.
  Linear linear(const std::string& name) const;
  /// Throws Problem where there are weights that nobody has asked for: a model that has them
  /// computes something else.
  void require_all_used() const;

 private:
  class Line;
  struct Vector {
    const float* data;
    std::size_t size;
  };

  void parse_line(std::string_view what, Line& line);
  void parse_tensor(Line& line, std::vector<TensorInfo>& tensors);
  const std::uint8_t* weights(Line& line, std::size_t bytes);

  std::span<const std::uint8_t> data_;
  std::string kind_;
  std::vector<Group> groups_;
  std::map<std::string, std::vector<double>> numbers_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;
  mutable std::set<std::string> used_;  ///< names of weights that were asked for
  std::size_t weight_bytes_ = 0;
};

}  // namespace edgevl::emulator

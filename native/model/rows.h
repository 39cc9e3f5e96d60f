// Rows of a matrix as a checkpoint has it, in memory or in a file.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

#include "model/pack.h"

namespace edgevl {

/// A file could not be read.
class __attribute__((visibility("default"))) FileError : public std::system_error {
 public:
  /// `error` is an errno, `reason` what it means here, `file` the name of the file.
  FileError(int error, const std::string& reason, const std::string& file)
      : std::system_error(error, std::generic_category(), file + ": " + reason),
        reason(reason),
        file(file) {}

  std::string reason, file;
};

/// A matrix [rows, cols] of which some rows are wanted now and then.
///
/// Rows in a file are read as they are asked for. Were it mapped, the system would map the
/// neighbours of every row along with it, and a large matrix would come to lie in memory as a
/// whole. Reading is safe from several threads. Copies share the file.
class Rows {
 public:
  Rows() = default;

  /// Rows in memory, which is not copied.
  Rows(const PlainMatrix& matrix) : matrix_(matrix) {}

  /// Rows in a file that is open for reading as `descriptor`, from byte `offset` on; `name` is for
  /// messages. The descriptor is duplicated. Throws FileError.
  Rows(Dtype dtype, int rows, int cols, int descriptor, std::int64_t offset,
       const std::string& name);

  Dtype dtype() const { return matrix_.dtype; }
  int rows() const { return matrix_.rows; }
  int cols() const { return matrix_.cols; }
  std::size_t row_bytes() const;

  /// A row as it is stored: where it lies in memory, or read into `buffer` [row_bytes()]. Throws
  /// FileError.
  const void* stored(int index, void* buffer) const;

  /// Converts a row to float32 [cols], by way of `buffer` [row_bytes()]. Throws FileError.
  void row(int index, float* out, void* buffer) const;

 private:
  struct File;

  PlainMatrix matrix_;  ///< without data if it is in a file
  std::shared_ptr<const File> file_;
  std::int64_t offset_ = 0;
};

}  // namespace edgevl

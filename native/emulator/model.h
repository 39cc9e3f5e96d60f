// A loaded model: its file, and the computation that the file describes.

#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "emulator/export.h"
#include "emulator/model_file.h"
#include "model/buffer.h"
#include "threads/thread_pool.h"

namespace edgevl::emulator {

/// Where a tensor of a run is to lie, as a program says.
struct Place {
  std::uint64_t address;
  const void* cpu;  ///< where the processor sees it; null on a card
  std::uint64_t bytes;
};

/// What one kind of model computes.
class Program {
 public:
  virtual ~Program() = default;

  /// Computes outputs from inputs, each with the size that the group says. Throws Problem.
  virtual void run(const Group& group, std::span<std::uint8_t* const> inputs,
                   std::span<std::uint8_t* const> outputs, ThreadPool& pool) = 0;
};

/// Makes the program of a file, which it keeps pointing into. Throws Problem, or
/// std::invalid_argument, for sizes that do not agree.
std::unique_ptr<Program> make_program(const ModelFile& file, ThreadPool& pool);

class EDGEVL_EXPORT Model {
 public:
  /// Copies the file; its weights take their part of the board's memory. Throws Problem.
  explicit Model(std::span<const std::uint8_t> data);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const std::vector<Group>& groups() const { return file_.groups(); }
  std::size_t weight_bytes() const { return file_.weight_bytes(); }
  const Group& group(std::size_t index) const;

  /// Runs one group on tensors in the board's memory, `on_card` by their device addresses alone.
  /// Throws Problem.
  void run(std::size_t group, std::span<const Place> inputs, std::span<const Place> outputs,
           bool on_card);

 private:
  Buffer<std::uint8_t> data_;
  ModelFile file_;
  std::unique_ptr<Program> program_;  ///< null where nothing is computed
};

}  // namespace edgevl::emulator

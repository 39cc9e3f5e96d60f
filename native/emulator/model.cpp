#include "emulator/model.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "emulator/board.h"

namespace edgevl::emulator {
namespace {

using Clock = std::chrono::steady_clock;
using Kind = Problem::Kind;

/// Tensors begin at multiples of this.
constexpr std::uint64_t kAlignment = 128;
/// How late the system may wake a thread that sleeps.
constexpr std::chrono::microseconds kLateness{300};

/// The threads that take the NPU's place.
ThreadPool& pool() {
  static ThreadPool pool(Board::get().settings().threads);
  return pool;
}

/// Weights that are computed with outlive the caller's.
Buffer<std::uint8_t> copy(std::span<const std::uint8_t> data) {
  if (!Board::get().settings().compute) return {};
  Buffer<std::uint8_t> buffer(data.size());
  std::copy(data.begin(), data.end(), buffer.data());
  return buffer;
}

/// Requires that tensors lie where they can be worked on.
void check_places(const std::vector<TensorInfo>& tensors, std::span<const Place> places,
                  bool are_outputs, bool on_card) {
  Board& board = Board::get();
  const char* what = are_outputs ? "outputs" : "inputs";
  if (places.size() != tensors.size()) {
    throw Problem(Kind::kTensors, std::to_string(places.size()) + " " + what +
                                      " are given, the model has " +
                                      std::to_string(tensors.size()));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& place = places[i];
    const std::string& name = tensors[i].name;
    const std::size_t bytes = tensors[i].bytes();
    if (place.address % kAlignment != 0) {
      throw Problem(Kind::kUnaligned, name + " at " + hex(place.address) +
                                          " does not begin at a multiple of " +
                                          std::to_string(kAlignment));
    }
    if (place.bytes < bytes) {
      throw Problem(Kind::kTensors, name + " is given " + std::to_string(place.bytes) +
                                        " bytes, but has " + std::to_string(bytes));
    }
    if (on_card) {
      board.memory().view(place.address, place.bytes, name.c_str());
    } else {
      board.memory().check(place.address, place.cpu, place.bytes, name.c_str());
    }
    if (const auto dirty = board.memory().first_dirty(place.address, bytes)) {
      if (are_outputs) {
        throw Problem(Kind::kDirtyOutput,
                      "output " + name + ": the line at " + hex(dirty) +
                          " was written and not flushed; it may fall on the output later");
      }
      throw Problem(Kind::kUnflushed, "input " + name + ": the line at " + hex(dirty) +
                                          " was written and not flushed; the NPU would not see it");
    }
  }
}

/// Requires that no output lies on another tensor of the run. What is appended to a cache may lie
/// in it: which rows are read then, the mask says.
void check_overlaps(const Group& group, std::span<const Place> inputs,
                    std::span<const Place> outputs) {
  auto check = [](const TensorInfo& a, const Place& at, const TensorInfo& b, const Place& other) {
    if (at.address < other.address + b.bytes() && other.address < at.address + a.bytes()) {
      throw Problem(Kind::kOverlap, "output " + a.name + " lies on " + b.name);
    }
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const auto& output = group.outputs[i];
    for (std::size_t j = 0; j < inputs.size(); ++j) {
      if (output.name == group.inputs[j].name + "_out") continue;
      check(output, outputs[i], group.inputs[j], inputs[j]);
    }
    for (std::size_t j = 0; j < i; ++j) check(output, outputs[i], group.outputs[j], outputs[j]);
  }
}

std::vector<std::uint8_t*> views(const std::vector<TensorInfo>& tensors,
                                 std::span<const Place> places) {
  std::vector<std::uint8_t*> views;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const char* name = tensors[i].name.c_str();
    views.push_back(Board::get().memory().view(places[i].address, tensors[i].bytes(), name));
  }
  return views;
}

/// Waits to the microsecond: who sleeps is woken late, so the last part is not slept.
void wait_until(Clock::time_point end) {
  std::this_thread::sleep_until(end - kLateness);
  while (Clock::now() < end) {
  }
}

}  // namespace

Model::Model(std::span<const std::uint8_t> data) try
    : data_(copy(data)),
      file_(data_.data() ? std::span<const std::uint8_t>(data_.data(), data.size()) : data) {
  program_ = make_program(file_, pool());
  if (!Board::get().settings().compute) program_.reset();
  std::this_thread::sleep_for(Board::get().settings().load);
  Board::get().take_weights(file_.weight_bytes());
} catch (const std::invalid_argument& error) {
  throw Problem(Kind::kModel, std::string("the model: ") + error.what());
}

Model::~Model() { Board::get().return_weights(file_.weight_bytes()); }

const Group& Model::group(std::size_t index) const {
  if (index >= groups().size()) {
    throw Problem(Kind::kValue, "the model has " + std::to_string(groups().size()) +
                                    " groups, there is no group " + std::to_string(index));
  }
  return groups()[index];
}

void Model::run(std::size_t index, std::span<const Place> inputs, std::span<const Place> outputs,
                bool on_card) {
  using std::chrono::nanoseconds;
  const auto start = Clock::now();
  Board& board = Board::get();
  board.require_initialized();
  const Group& group = this->group(index);
  const auto npu_time =
      std::chrono::duration_cast<nanoseconds>(std::chrono::duration<double, std::milli>(group.ms));
  board.count(&EDGEVL_EMULATOR_COUNTERS::runs);
  board.count(&EDGEVL_EMULATOR_COUNTERS::npu_ns, npu_time.count());
  check_places(group.inputs, inputs, false, on_card);
  check_places(group.outputs, outputs, true, on_card);
  check_overlaps(group, inputs, outputs);
  static std::mutex npu;  // there is one
  std::lock_guard lock(npu);
  if (program_) {
    program_->run(group, views(group.inputs, inputs), views(group.outputs, outputs), pool());
  }
  if (board.settings().timing) wait_until(start + npu_time);
}

}  // namespace edgevl::emulator

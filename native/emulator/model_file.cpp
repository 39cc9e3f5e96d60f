#include "emulator/model_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>

#include "emulator/problem.h"
#include "model/pack.h"

namespace edgevl::emulator {
namespace {

constexpr std::string_view kMagic = "edgevl emulated axmodel\n";

// Bounds that no real model comes near.
constexpr std::size_t kMaxHeader = 1 << 20;
constexpr std::size_t kMaxGroups = 256;
constexpr std::size_t kMaxTensors = 16;
constexpr std::size_t kMaxDimensions = 8;
constexpr std::size_t kMaxNumbers = 8;
constexpr std::size_t kMaxName = 64;
constexpr double kMaxMs = 60'000;
constexpr long kMaxSize = 1 << 24;
constexpr long kMaxTensorBytes = 1 << 30;

[[noreturn]] void fail(const std::string& what) {
  throw Problem(Problem::Kind::kModel, "the model: " + what);
}

std::size_t size_of(Type type) { return type == Type::kU8 ? 1 : type == Type::kBf16 ? 2 : 4; }

}  // namespace

std::size_t TensorInfo::bytes() const {
  std::size_t bytes = size_of(type);
  for (const auto size : shape) bytes *= size;
  return bytes;
}

/// The words of a line of the header.
class ModelFile::Line {
 public:
  Line(std::string_view text, int number) : text_(text), number_(number) {}

  bool is_empty() const { return text_.empty(); }

  std::string_view word() {
    const auto end = std::min(text_.find(' '), text_.size());
    const auto word = text_.substr(0, end);
    text_.remove_prefix(std::min(end + 1, text_.size()));
    if (word.empty() || word.size() > kMaxName) fail("a word is missing or too long");
    return word;
  }
  std::string name() {
    const auto text = word();
    auto is_fit = [](unsigned char c) { return c > ' ' && c < 127; };
    if (!std::all_of(text.begin(), text.end(), is_fit)) fail("a name is not in ASCII");
    return std::string(text);
  }
  long integer(long least, long most) {
    const auto text = word();
    long value = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || stop != text.data() + text.size() || value < least ||
        value > most) {
      fail("a number is not from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value;
  }
  double number() {
    const auto text = word();
    double value = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || stop != text.data() + text.size() || !std::isfinite(value)) {
      fail("a number is not one");
    }
    return value;
  }
  void require_end() const {
    if (!is_empty()) fail("there are too many words");
  }
  [[noreturn]] void fail(const std::string& what) const {
    emulator::fail("line " + std::to_string(number_) + " of its header: " + what);
  }

 private:
  std::string_view text_;
  int number_;
};

ModelFile::ModelFile(std::span<const std::uint8_t> data) : data_(data) {
  std::string_view header(reinterpret_cast<const char*>(data.data()),
                          std::min(data.size(), kMaxHeader));
  if (!header.starts_with(kMagic)) {
    fail("it is not one of the emulator's, which `edgevl compile --emulate` writes");
  }
  header.remove_prefix(kMagic.size());
  for (int number = 2;; ++number) {
    const auto end = header.find('\n');
    if (end == header.npos) fail("its header is cut off");
    Line line(header.substr(0, end), number);
    header.remove_prefix(end + 1);
    const auto what = line.word();
    if (what != "end") parse_line(what, line);
    line.require_end();
    if (what == "end") break;
  }
  for (const auto& group : groups_) {
    if (group.inputs.empty() || group.outputs.empty()) fail("a group has no inputs or no outputs");
    if (group.inputs.size() != groups_[0].inputs.size() ||
        group.outputs.size() != groups_[0].outputs.size()) {
      fail("its groups have different numbers of tensors");
    }
  }
  if (kind_.empty() || groups_.empty()) fail("it has no kind or no groups");
}

void ModelFile::parse_line(std::string_view what, Line& line) {
  if (what == "kind" && kind_.empty()) {
    kind_ = line.name();
  } else if (what == "number") {
    const auto name = line.name();
    auto& numbers = numbers_[name];
    if (!numbers.empty()) line.fail(name + " is there already");
    while (!line.is_empty() && numbers.size() < kMaxNumbers) numbers.push_back(line.number());
  } else if (what == "group" && groups_.size() < kMaxGroups) {
    const double ms = line.number();
    if (ms < 0 || ms > kMaxMs) line.fail("a group takes " + std::to_string(ms) + " ms");
    groups_.push_back({ms, {}, {}});
  } else if (what == "input" && !groups_.empty()) {
    parse_tensor(line, groups_.back().inputs);
  } else if (what == "output" && !groups_.empty()) {
    parse_tensor(line, groups_.back().outputs);
  } else if (what == "matrix") {
    const auto name = line.name();
    const auto rows = static_cast<int>(line.integer(1, kMaxSize));
    const auto cols = static_cast<int>(line.integer(1, kMaxSize));
    auto matrix = describe(Format::kBf16, rows, cols, 1);
    matrix.data = weights(line, matrix.bytes());
    if (!matrices_.emplace(name, matrix).second) line.fail(name + " is there already");
  } else if (what == "vector") {
    const auto name = line.name();
    const auto size = static_cast<std::size_t>(line.integer(1, kMaxSize));
    const auto* data = reinterpret_cast<const float*>(weights(line, size * sizeof(float)));
    if (!vectors_.emplace(name, Vector{data, size}).second) line.fail(name + " is there already");
  } else {
    line.fail("it begins with a word that is unknown there, or one too many");
  }
}

void ModelFile::parse_tensor(Line& line, std::vector<TensorInfo>& tensors) {
  if (tensors.size() == kMaxTensors) line.fail("there are too many tensors");
  constexpr std::pair<std::string_view, Type> kTypes[] = {{"u8", Type::kU8},
                                                          {"i32", Type::kI32},
                                                          {"u32", Type::kU32},
                                                          {"bf16", Type::kBf16},
                                                          {"f32", Type::kF32}};
  TensorInfo tensor{line.name(), Type::kU8, {}};
  const auto name = line.word();
  const auto* known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const auto& entry) { return entry.first == name; });
  if (known == std::end(kTypes)) line.fail("a type is unknown");
  tensor.type = known->second;
  long left = kMaxTensorBytes / static_cast<long>(size_of(tensor.type));
  while (!line.is_empty() && tensor.shape.size() < kMaxDimensions) {
    const long size = line.integer(1, left);
    left /= size;
    tensor.shape.push_back(static_cast<std::int32_t>(size));
  }
  if (tensor.shape.empty()) line.fail("a tensor has no shape");
  tensors.push_back(std::move(tensor));
}

/// Where the data is that a line speaks of.
const std::uint8_t* ModelFile::weights(Line& line, std::size_t bytes) {
  const auto offset = static_cast<std::size_t>(
      line.integer(static_cast<long>(kMagic.size()), std::numeric_limits<long>::max()));
  if (offset % kLineBytes != 0 || offset > data_.size() || bytes > data_.size() - offset) {
    line.fail("its data is not in the file, which has " + std::to_string(data_.size()) + " bytes");
  }
  weight_bytes_ += bytes;
  return data_.data() + offset;
}

const std::vector<double>& ModelFile::numbers(const std::string& name, std::size_t count) const {
  const auto found = numbers_.find(name);
  if (found == numbers_.end() || found->second.size() != count) {
    fail(name + " is missing, or not " + std::to_string(count) + " numbers");
  }
  return found->second;
}

int ModelFile::integer(const std::string& name) const {
  const double value = numbers(name, 1)[0];
  if (value < 0 || value > static_cast<double>(kMaxSize) || value != std::floor(value)) {
    fail(name + " is " + std::to_string(value));
  }
  return static_cast<int>(value);
}

const float* ModelFile::vector(const std::string& name, std::size_t size) const {
  const float* data = optional_vector(name, size);
  if (!data) fail(name + " is missing");
  return data;
}

const float* ModelFile::optional_vector(const std::string& name, std::size_t size) const {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) return nullptr;
  if (found->second.size != size) {
    fail(name + " has " + std::to_string(found->second.size) + " numbers, expected " +
         std::to_string(size));
  }
  used_.insert(name);
  return found->second.data;
}

Linear ModelFile::linear(const std::string& name) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) fail(name + " is missing");
  used_.insert(name);
  const auto rows = static_cast<std::size_t>(found->second.rows);
  return {found->second, optional_vector(name + "_bias", rows)};
}

void ModelFile::require_all_used() const {
  const auto require = [&](const auto& weights) {
    for (const auto& [name, weight] : weights) {
      if (!used_.contains(name)) fail(name + " is not one of the model's weights");
    }
  };
  require(matrices_);
  require(vectors_);
}

}  // namespace edgevl::emulator

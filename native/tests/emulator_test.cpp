// The emulator: the rules of memory one by one, damaged models, and a layer beside plain loops.
// Prints what failed; the exit status is 1 then. What the emulator says on standard error belongs
// to the test.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "emulator/axcl_api.h"
#include "emulator/board.h"
#include "emulator/layer.h"
#include "emulator/model_file.h"
#include "emulator/npu_api.h"
#include "emulator/problem.h"
#include "model/floats.h"
#include "model/pack.h"

using namespace edgevl;
using namespace edgevl::emulator;
using Kind = Problem::Kind;

namespace {

int failures = 0;
std::mt19937 random_bits(20240501);

void fail(const std::string& what, int line) {
  ++failures;
  std::printf("FAILED %s (line %d)\n", what.c_str(), line);
}

#define CHECK(condition)                          \
  do {                                            \
    if (!(condition)) fail(#condition, __LINE__); \
  } while (false)
/// That a function for programs refuses something, and why.
#define CHECK_STATUS(call, kind) CHECK((call) == Problem(kind, "").status())

std::vector<float> normal(std::size_t n, float size = 1, float mean = 0) {
  std::normal_distribution<float> distribution(mean, size);
  std::vector<float> values(n);
  for (auto& value : values) value = distribution(random_bits);
  return values;
}

EDGEVL_EMULATOR_COUNTERS counters() {
  EDGEVL_EMULATOR_COUNTERS counters;
  EDGEVL_EMULATOR_Counters(&counters);
  return counters;
}

struct Cmm {
  unsigned long long address = 0;
  void* cpu = nullptr;
  std::uint32_t bytes;

  explicit Cmm(std::uint32_t size) : bytes(size) {
    CHECK(AX_SYS_MemAllocCached(&address, &cpu, size, 128, nullptr) == 0);
  }
  ~Cmm() { AX_SYS_MemFree(address, cpu); }
  Cmm(const Cmm&) = delete;
  Cmm& operator=(const Cmm&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(cpu); }
  int flush() const { return AX_SYS_MflushCache(address, cpu, bytes); }
  int invalidate() const { return AX_SYS_MinvalidateCache(address, cpu, bytes); }
  AX_ENGINE_IO_BUFFER buffer() const { return {address, cpu, bytes, nullptr, 0, {}}; }
};

// --- memory ------------------------------------------------------------------------------------

void test_memory() {
  const auto before = counters();
  Cmm memory(1000);
  auto* const device = Board::get().memory().view(memory.address, memory.bytes, "all");
  CHECK(memory.address >= 0x140000000 && memory.address % 128 == 0 && device != memory.data());

  // Only what is flushed is seen, in whole lines.
  std::fill_n(memory.data(), 1000, std::uint8_t{7});
  CHECK(device[0] == 0);
  CHECK(AX_SYS_MflushCache(memory.address + 100, memory.data() + 100, 1) == 0);
  CHECK(device[63] == 0 && device[64] == 7 && device[127] == 7 && device[128] == 0);
  CHECK(memory.flush() == 0 && device[0] == 7 && device[999] == 7);

  // What the NPU writes is seen after the lines are invalidated, and flushing leaves it alone.
  device[500] = 9;
  CHECK(memory.flush() == 0 && device[500] == 9 && memory.data()[500] == 7);
  CHECK(memory.invalidate() == 0 && memory.data()[500] == 9);
  device[700] = 8;
  CHECK(AX_SYS_MinvalidateCache(memory.address + 641, memory.data() + 641, 1) == 0);
  CHECK(memory.data()[700] == 8);  // of the same line
  memory.data()[501] = 5;
  CHECK_STATUS(memory.invalidate(), Kind::kDiscarded);
  CHECK(memory.data()[501] == 7);

  // Ranges that are not where they should be.
  const auto flush = AX_SYS_MflushCache;
  CHECK_STATUS(flush(memory.address + 1, memory.data(), 1), Kind::kCpuAddress);
  CHECK_STATUS(flush(memory.address, memory.data() + 64, 1), Kind::kCpuAddress);
  CHECK_STATUS(flush(memory.address, memory.data(), 1001), Kind::kBeyond);
  CHECK_STATUS(flush(memory.address + 990, memory.data() + 990, 11), Kind::kBeyond);
  CHECK_STATUS(flush(memory.address + 1000, memory.data() + 1000, 1), Kind::kAddress);
  CHECK_STATUS(flush(memory.address - 1, memory.data() - 1, 1), Kind::kAddress);
  CHECK_STATUS(AX_SYS_MinvalidateCache(0x1000, memory.data(), 1), Kind::kAddress);
  CHECK_STATUS(flush(memory.address, memory.data(), 0xffffffff), Kind::kBeyond);

  const auto after = counters();
  CHECK(after.flushes - before.flushes == 10 && after.invalidates - before.invalidates == 4);
  CHECK(after.flushed_bytes - before.flushed_bytes == 1 + 2 * 1000 + 4 + 1001 + 11 + 0xffffffffull);
  CHECK(after.problems - before.problems == 9 && after.emulator_ns > before.emulator_ns);
  CHECK(after.cmm_bytes - before.cmm_bytes == 1000);
}

void test_allocation() {
  // Memory that would be adjacent is not.
  const Cmm page(4096), next(4096);
  CHECK(next.address - page.address > 4096);
  CHECK_STATUS(AX_SYS_MflushCache(page.address + 4096, page.data() + 4096, 1), Kind::kAddress);
  unsigned long long address = 0;
  void* cpu = nullptr;
  CHECK(AX_SYS_MemAllocCached(&address, &cpu, 100, 1 << 20, nullptr) == 0);
  CHECK(address % (1 << 20) == 0);
  CHECK_STATUS(AX_SYS_MemFree(address + 64, static_cast<std::uint8_t*>(cpu) + 64), Kind::kAddress);
  CHECK_STATUS(AX_SYS_MemFree(address, nullptr), Kind::kCpuAddress);
  CHECK(AX_SYS_MemFree(address, cpu) == 0);
  CHECK_STATUS(AX_SYS_MemFree(address, cpu), Kind::kAddress);
  CHECK_STATUS(AX_SYS_MflushCache(address, cpu, 1), Kind::kAddress);
  CHECK_STATUS(AX_SYS_MemAllocCached(&address, &cpu, 0, 128, nullptr), Kind::kValue);
  CHECK_STATUS(AX_SYS_MemAllocCached(&address, &cpu, 1, 100, nullptr), Kind::kValue);
  CHECK_STATUS(AX_SYS_MemAllocCached(nullptr, &cpu, 1, 128, nullptr), Kind::kValue);
  CHECK_STATUS(AX_SYS_MemAllocCached(&address, &cpu, 65 << 20, 0, nullptr), Kind::kNoMemory);
}

void test_settings() {
  for (const auto& [name, text] : {std::pair{"EDGEVL_EMULATOR_COMPUTE", "2"},
                                   {"EDGEVL_EMULATOR_CHECK", "yes"},
                                   {"EDGEVL_EMULATOR_TIMING", "-1"},
                                   {"EDGEVL_EMULATOR_CMM", "0"},
                                   {"EDGEVL_EMULATOR_THREADS", "1 "}}) {
    ::setenv(name, text, 1);
    CHECK_STATUS(AX_SYS_Init(), Kind::kSetting);
    CHECK_STATUS(axclInit(nullptr), Kind::kSetting);
    ::unsetenv(name);
  }
  ::setenv("EDGEVL_EMULATOR_CMM", "64", 1);
  ::setenv("EDGEVL_EMULATOR_THREADS", "2", 1);
}

// --- models ------------------------------------------------------------------------------------

/// A file in the making.
class File {
 public:
  std::string header = "edgevl emulated axmodel\n";

  void add(const std::string& line) { header += line + "\n"; }
  void add_vector(const std::string& name, const std::vector<float>& values) {
    add("vector " + name + " " + std::to_string(values.size()) + " " + place(values.size() * 4));
    std::memcpy(data_.data() + data_.size() - (values.size() * 4 + 63) / 64 * 64, values.data(),
                values.size() * 4);
  }
  void add_matrix(const std::string& name, int rows, int cols, const std::vector<float>& values) {
    ThreadPool pool(1);
    const Matrix matrix = describe(Format::kBf16, rows, cols, 1);
    add("matrix " + name + " " + std::to_string(rows) + " " + std::to_string(cols) + " " +
        place(matrix.bytes()));
    Buffer<std::uint8_t> packed(matrix.bytes());
    pack(PlainMatrix{Dtype::kF32, rows, cols, values.data()}, matrix, packed.data(), {}, pool);
    std::copy_n(packed.data(), matrix.bytes(), data_.end() - matrix.bytes());
  }
  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all(kHeader);
    const std::string text = header + "end\n";
    std::copy(text.begin(), text.end(), all.begin());
    all.insert(all.end(), data_.begin(), data_.end());
    return all;
  }

 private:
  static constexpr std::size_t kHeader = 4096;

  std::string place(std::size_t bytes) {
    const auto offset = kHeader + data_.size();
    data_.resize(data_.size() + (bytes + 63) / 64 * 64);
    return std::to_string(offset);
  }

  std::vector<std::uint8_t> data_;
};

constexpr int kHidden = 32, kVocabulary = 50;

/// A small output layer, and its weights.
struct Post {
  std::vector<float> norm = normal(kHidden, 0.1f, 1), head = normal(kHidden * kVocabulary);
  File file;

  explicit Post(const std::string& outputs = "output output bf16 1 1 50") {
    file.add("kind post");
    file.add("number hidden_size 32");
    file.add("number vocab_size 50");
    file.add("number rms_norm_eps 1e-06");
    file.add("group 1.5");
    file.add("input input bf16 1 1 32");
    file.add(outputs);
    file.add_vector("norm", norm);
    file.add_matrix("head", kVocabulary, kHidden, head);
  }
};

/// A model with its tensors in memory.
struct Loaded {
  std::uint64_t *handle = nullptr, *context = nullptr;

  explicit Loaded(const std::vector<std::uint8_t>& file) {
    CHECK(AX_ENGINE_CreateHandleV2(&handle, file.data(), file.size(), nullptr) == 0);
    CHECK(AX_ENGINE_CreateContextV2(handle, &context) == 0);
  }
  ~Loaded() { CHECK(AX_ENGINE_DestroyHandle(handle) == 0); }
  Loaded(const Loaded&) = delete;
  Loaded& operator=(const Loaded&) = delete;

  int run(std::vector<AX_ENGINE_IO_BUFFER> in, std::vector<AX_ENGINE_IO_BUFFER> out,
          std::uint32_t group = 0) const {
    AX_ENGINE_IO io = {in.data(),  static_cast<std::uint32_t>(in.size()),
                       out.data(), static_cast<std::uint32_t>(out.size()),
                       1,          nullptr,
                       {}};
    return AX_ENGINE_RunGroupIOSync(handle, context, group, &io);
  }
};

void test_description() {
  const Loaded post(Post().file.bytes());
  AX_ENGINE_IO_INFO* info = nullptr;
  std::uint32_t groups = 0;
  CHECK(AX_ENGINE_GetGroupIOInfoCount(post.handle, &groups) == 0 && groups == 1);
  CHECK(AX_ENGINE_GetGroupIOInfo(post.handle, 0, &info) == 0);
  CHECK(info->nInputSize == 1 && info->nOutputSize == 1);
  const auto& output = info->pOutputs[0];
  CHECK(std::string(output.pName) == "output" && output.nShapeSize == 3);
  CHECK(output.pShape[2] == 50 && output.nSize == 100);
  CHECK(output.eDataType == AX_ENGINE_DT_BFLOAT16);
  CHECK_STATUS(AX_ENGINE_GetGroupIOInfo(post.handle, 1, &info), Kind::kValue);
  AX_ENGINE_CMM_INFO usage;
  CHECK(counters().models == 1);
  std::uint64_t free = 0, total = 0;
  EDGEVL_EMULATOR_Memory(&free, &total);
  CHECK(total - free == counters().cmm_bytes + counters().weight_bytes && free < total);
  CHECK(AX_ENGINE_GetCMMUsage(post.handle, &usage) == 0);
  CHECK(usage.nCMMSize == kHidden * 4 + 64 * kHidden * 2);
  std::uint64_t other = 0;
  CHECK_STATUS(AX_ENGINE_GetGroupIOInfo(&other, 0, &info), Kind::kHandle);
}

void test_run() {
  const Post made;
  const Loaded post(made.file.bytes());
  Cmm in(kHidden * 2), out(kVocabulary * 2), wide(4096);
  auto* x = reinterpret_cast<std::uint16_t*>(in.data());
  for (int i = 0; i < kHidden; ++i) x[i] = to_bf16(0.25f * static_cast<float>(i % 7) - 0.5f);

  CHECK_STATUS(post.run({in.buffer()}, {out.buffer()}), Kind::kUnflushed);
  CHECK(in.flush() == 0);
  out.data()[99] = 1;
  CHECK_STATUS(post.run({in.buffer()}, {out.buffer()}), Kind::kDirtyOutput);
  CHECK(out.flush() == 0);
  CHECK_STATUS(post.run({}, {out.buffer()}), Kind::kTensors);
  CHECK_STATUS(post.run({in.buffer(), in.buffer()}, {out.buffer()}), Kind::kTensors);
  CHECK_STATUS(post.run({in.buffer()}, {out.buffer()}, 1), Kind::kValue);
  auto buffer = in.buffer();
  buffer.nSize = kHidden * 2 - 1;
  CHECK_STATUS(post.run({buffer}, {out.buffer()}), Kind::kTensors);
  buffer.nSize = kHidden * 2 + 1;
  CHECK_STATUS(post.run({buffer}, {out.buffer()}), Kind::kBeyond);
  buffer = wide.buffer();
  buffer.phyAddr += 64;
  buffer.pVirAddr = wide.data() + 64;
  buffer.nSize = kVocabulary * 2;
  CHECK_STATUS(post.run({in.buffer()}, {buffer}), Kind::kUnaligned);
  buffer.phyAddr += 64;
  CHECK_STATUS(post.run({in.buffer()}, {buffer}), Kind::kCpuAddress);
  buffer.phyAddr = reinterpret_cast<std::uintptr_t>(wide.cpu);
  buffer.phyAddr &= ~std::uint64_t{127};
  CHECK_STATUS(post.run({in.buffer()}, {buffer}), Kind::kAddress);
  CHECK_STATUS(post.run({wide.buffer()}, {wide.buffer()}), Kind::kOverlap);

  // More room than a tensor takes is no problem.
  std::copy_n(in.data(), in.bytes, wide.data());
  CHECK(wide.flush() == 0);
  CHECK(post.run({wide.buffer()}, {out.buffer()}) == 0);
  CHECK(out.data()[98] == 0 && out.data()[99] == 1);  // not seen yet
  CHECK(out.invalidate() == 0);
  double squares = 0;
  for (int i = 0; i < kHidden; ++i) squares += std::pow(from_bf16(x[i]), 2);
  const double scale = 1 / std::sqrt(squares / kHidden + 1e-6);
  for (int row = 0; row < kVocabulary; ++row) {
    double logit = 0;
    for (int i = 0; i < kHidden; ++i) {
      const auto normed = static_cast<float>(from_bf16(x[i]) * scale * made.norm[i]);
      logit += static_cast<double>(from_bf16(to_bf16(normed))) *
               from_bf16(to_bf16(made.head[row * kHidden + i]));
    }
    const auto found = from_bf16(reinterpret_cast<const std::uint16_t*>(out.data())[row]);
    // Half a step of bfloat16, and a rounding or two of the inputs that fell to the other side.
    CHECK(std::fabs(found - logit) <= 0x1p-8 * std::fabs(logit) + 0x1p-8);
  }
}

/// Every damage is a status, and takes no memory that the file does not have.
void test_damaged() {
  const auto whole = Post().file.bytes();
  const auto peak = counters().cmm_peak_bytes;
  auto load = [](const std::vector<std::uint8_t>& bytes) {
    std::uint64_t* handle = nullptr;
    const int status = AX_ENGINE_CreateHandleV2(&handle, bytes.data(), bytes.size(), nullptr);
    if (status == 0) AX_ENGINE_DestroyHandle(handle);
    return status;
  };
  CHECK(load(whole) == 0);
  const std::size_t header = std::string(whole.begin(), whole.end()).find("end\n") + 4;
  for (std::size_t size = 1; size < whole.size(); size += size < header ? 1 : 61) {
    CHECK(load({whole.begin(), whole.begin() + size}) != 0);
  }
  for (int i = 0; i < 3000; ++i) {
    auto damaged = whole;
    for (int n = 0; n <= i % 3; ++n) {
      damaged[random_bits() % header] =
          i % 2 ? static_cast<std::uint8_t>(random_bits()) : "0123456789 \n-e"[random_bits() % 14];
    }
    load(damaged);
  }
  const auto with = [](const std::string& from, const std::string& to) {
    File file = Post().file;
    const auto at = file.header.find(from);
    if (at == file.header.npos) {
      fail(from + " is not in the file", __LINE__);
    } else {
      file.header.replace(at, from.size(), to);
    }
    return file.bytes();
  };
  for (const auto& [from, to] :
       {std::pair{"axmodel\n", "axmodel \n"},
        {"kind post", "kind toast"},
        {"kind post\n", ""},
        {"hidden_size 32", "hidden_size 16777216"},
        {"hidden_size 32", "hidden_size 32.5"},
        {"hidden_size 32", "hidden_size nan"},
        {"hidden_size 32", "hidden_size 32 32"},
        {"vocab_size 50", "vocab_size 16777216"},
        {"group 1.5", "group -1"},
        {"group 1.5", "group 1e300"},
        {"bf16 1 1 32", "f32 1 1 32"},
        {"bf16 1 1 32", "bf16 1 1 33"},
        {"bf16 1 1 32", "bf16 65536 65536 65536 65536"},
        {"bf16 1 1 32", "bf16 0 1 32"},
        {"bf16 1 1 32", "bf16"},
        {"output output", "output other"},
        {"vector norm 32", "vector norm 31"},
        {"vector norm 32 4096", "vector norm 32 4160000"},
        {"vector norm 32 4096", "vector norm 32 4097"},
        {"vector norm 32 4096", "vector norm 32 9223372036854775744"},
        {"vector norm", "vector form"},
        {"vector norm 32 4096", "vector norm 32 4096\nvector other 32 4096"},
        {"matrix head 50", "matrix head 16777215"},
        {"matrix head 50 32", "matrix head 50 30"},
        {"number vocab_size", "number hidden_size"}}) {
    if (load(with(from, to)) != Problem(Kind::kModel, "").status()) {
      fail(std::string(from) + " -> " + to, __LINE__);
    }
  }
  CHECK(counters().cmm_peak_bytes - peak < 1 << 16);
}

// --- layers ------------------------------------------------------------------------------------

/// A layer of Qwen2's and Qwen3's kinds together: biases and norms of queries and keys.
struct SmallLayer {
  static constexpr int kHeads = 4, kKvHeads = 2, kDim = 16, kInner = 48, kWidth = kKvHeads * kDim;
  DecoderConfig config;
  std::vector<float> input_norm = normal(kHidden, 0.1f, 1), post_norm = normal(kHidden, 0.1f, 1);
  std::vector<float> q_norm = normal(kDim, 0.1f, 1), k_norm = normal(kDim, 0.1f, 1);
  std::vector<float> frequencies = {1, 0.5f, 0.25f, 0.125f, 0.1f, 0.05f, 0.01f, 0.001f};
  std::vector<float> bias = normal((kHeads + 2 * kKvHeads) * kDim, 0.1f);
  std::vector<float> qkv, o, gate, up, down;
  std::vector<Buffer<std::uint8_t>> packed;
  DecoderLayer weights;

  SmallLayer() {
    config.hidden_size = kHidden;
    config.intermediate_size = kInner;
    config.num_attention_heads = kHeads;
    config.num_key_value_heads = kKvHeads;
    config.head_dim = kDim;
    config.rms_norm_eps = 1e-6f;
    config.num_hidden_layers = config.vocab_size = config.max_context = config.chunk = 1;
    weights.input_norm = input_norm.data();
    weights.post_norm = post_norm.data();
    weights.q_norm = q_norm.data();
    weights.k_norm = k_norm.data();
    weights.qkv.matrix = pack_one(qkv, config.qkv_rows(), kHidden);
    weights.qkv.bias = bias.data();
    weights.o.matrix = pack_one(o, kHidden, kHeads * kDim);
    weights.down.matrix = pack_one(down, kHidden, kInner);
    gate = round(normal(kInner * kHidden, 0.2f));
    up = round(normal(kInner * kHidden, 0.2f));
    ThreadPool pool(1);
    auto matrix = describe(Format::kBf16, 2 * kInner, kHidden, 1);
    packed.emplace_back(matrix.bytes());
    const auto out = packed.back().data();
    pack(PlainMatrix{Dtype::kF32, kInner, kHidden, gate.data()}, matrix, out, {0, 2}, pool);
    pack(PlainMatrix{Dtype::kF32, kInner, kHidden, up.data()}, matrix, out, {1, 2}, pool);
    matrix.data = out;
    weights.gate_up.matrix = matrix;
  }

  static std::vector<float> round(std::vector<float> values) {
    for (auto& value : values) value = from_bf16(to_bf16(value));
    return values;
  }

  Matrix pack_one(std::vector<float>& values, int rows, int cols) {
    values = round(normal(static_cast<std::size_t>(rows) * cols, 0.2f));
    ThreadPool pool(1);
    auto matrix = describe(Format::kBf16, rows, cols, 1);
    packed.emplace_back(matrix.bytes());
    pack(PlainMatrix{Dtype::kF32, rows, cols, values.data()}, matrix, packed.back().data(), {},
         pool);
    matrix.data = packed.back().data();
    return matrix;
  }

  static std::vector<float> times(const std::vector<float>& matrix, const std::vector<float>& x) {
    std::vector<float> y(matrix.size() / x.size());
    for (std::size_t row = 0; row < y.size(); ++row) {
      for (std::size_t i = 0; i < x.size(); ++i) y[row] += matrix[row * x.size() + i] * x[i];
    }
    return y;
  }

  static void normalize(float* x, const std::vector<float>& weight) {
    float squares = 0;
    for (std::size_t i = 0; i < weight.size(); ++i) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / static_cast<float>(weight.size()) + 1e-6f);
    for (std::size_t i = 0; i < weight.size(); ++i) x[i] *= scale * weight[i];
  }

  void rotate(float* x, std::uint32_t position) const {
    for (int i = 0; i < kDim / 2; ++i) {
      const float angle = static_cast<float>(position) * frequencies[i];
      const float a = x[i], b = x[i + kDim / 2];
      x[i] = a * std::cos(angle) - b * std::sin(angle);
      x[i + kDim / 2] = b * std::cos(angle) + a * std::sin(angle);
    }
  }

  /// Queries, keys and values [heads + 2 * kv_heads, head_dim] of a token.
  std::vector<float> project(std::vector<float> x, std::uint32_t position) const {
    normalize(x.data(), input_norm);
    auto y = times(qkv, x);
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += bias[i];
    for (int head = 0; head < kHeads + kKvHeads; ++head) {
      normalize(y.data() + head * kDim, head < kHeads ? q_norm : k_norm);
      rotate(y.data() + head * kDim, position);
    }
    return y;
  }

  /// The layer's output for a token, from keys and values [count, kWidth].
  std::vector<float> finish(std::vector<float> x, const std::vector<float>& projected,
                            const std::vector<float>& keys,
                            const std::vector<float>& values) const {
    const int count = static_cast<int>(keys.size()) / kWidth;
    std::vector<float> mixed(kHeads * kDim);
    for (int head = 0; head < kHeads; ++head) {
      const int from = head / (kHeads / kKvHeads) * kDim;
      std::vector<float> scores(count);
      float total = 0;
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < kDim; ++i) {
          scores[j] += projected[head * kDim + i] * keys[j * kWidth + from + i];
        }
        total += scores[j] = std::exp(scores[j] / std::sqrt(static_cast<float>(kDim)));
      }
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < kDim; ++i) {
          mixed[head * kDim + i] += scores[j] / total * values[j * kWidth + from + i];
        }
      }
    }
    auto y = times(o, mixed);
    for (int i = 0; i < kHidden; ++i) x[i] += y[i];
    y = x;
    normalize(y.data(), post_norm);
    auto gates = times(gate, y), ups = times(up, y);
    for (int i = 0; i < kInner; ++i) gates[i] *= ups[i] / (1 + std::exp(-gates[i]));
    y = times(down, gates);
    for (int i = 0; i < kHidden; ++i) x[i] += y[i];
    return x;
  }
};

std::vector<std::uint16_t> narrow(const std::vector<float>& values) {
  std::vector<std::uint16_t> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), to_bf16);
  return rounded;
}

double distance(const std::vector<std::uint16_t>& found, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(from_bf16(found[i]) - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  return std::sqrt(difference / size);
}

void test_layer() {
  constexpr int kWidth = SmallLayer::kWidth;
  const SmallLayer small;
  const Layer layer(small.config, small.weights, small.frequencies.data());
  ThreadPool pool(2);
  const std::uint16_t masked = to_bf16(kMasked);
  // Tokens, rows of the cache, and which of them are attended to.
  for (const auto& [tokens, rows, used] : {std::tuple{1, 0, std::vector<int>{}},
                                           {5, 0, {}},
                                           {1, 9, {0, 1, 2, 3}},
                                           {1, 9, {2, 5, 7}},
                                           {70, 130, {0, 1, 2, 3, 64, 65, 129}},
                                           {1, 9, {}}}) {
    const auto x = SmallLayer::round(normal(tokens * kHidden));
    const auto keys = SmallLayer::round(normal(rows * kWidth + 1));
    const auto values = SmallLayer::round(normal(rows * kWidth + 1));
    std::vector<std::uint16_t> mask(tokens * (rows + tokens), masked);
    std::vector<std::uint32_t> indices(tokens);
    for (int token = 0; token < tokens; ++token) {
      indices[token] = 100 + 3 * token;
      auto* row = mask.data() + token * (rows + tokens);
      for (const int column : used) row[column] = 0;
      std::fill_n(row + rows, token + 1, std::uint16_t{0});
    }
    const auto keys16 = narrow(keys), values16 = narrow(values), x16 = narrow(x);
    std::vector<std::uint16_t> keys_out(tokens * kWidth), values_out(tokens * kWidth);
    std::vector<std::uint16_t> out(tokens * kHidden);
    LayerTensors t{tokens,     rows,        keys16.data(),   values16.data(),   indices.data(),
                   x16.data(), mask.data(), keys_out.data(), values_out.data(), out.data()};
    layer.run(t, pool, kernels());

    std::vector<float> all_keys, all_values, new_keys, new_values, expected;
    for (const int column : used) {
      all_keys.insert(all_keys.end(), keys.begin() + column * kWidth,
                      keys.begin() + (column + 1) * kWidth);
      all_values.insert(all_values.end(), values.begin() + column * kWidth,
                        values.begin() + (column + 1) * kWidth);
    }
    for (int token = 0; token < tokens; ++token) {
      const std::vector<float> row(x.begin() + token * kHidden, x.begin() + (token + 1) * kHidden);
      const auto y = small.project(row, indices[token]);
      const auto key = y.begin() + SmallLayer::kHeads * SmallLayer::kDim;
      new_keys.insert(new_keys.end(), key, key + kWidth);
      new_values.insert(new_values.end(), key + kWidth, key + 2 * kWidth);
      all_keys.insert(all_keys.end(), key, key + kWidth);
      all_values.insert(all_values.end(), key + kWidth, key + 2 * kWidth);
      const auto finished = small.finish(row, y, all_keys, all_values);
      expected.insert(expected.end(), finished.begin(), finished.end());
    }
    // Rounding to bfloat16 is off by up to 2^-8, at the lower end of a binade: by 0.74 of that over
    // the square root of 3 in root mean square. Keys and values have two roundings, of the norm's
    // output and their own; those of the output add up to about five. Up to twice that may be luck.
    const double step = 0.74 * 0x1p-8 / std::sqrt(3);
    CHECK(distance(keys_out, new_keys) < 2 * std::sqrt(2) * step);
    CHECK(distance(values_out, new_values) < 2 * std::sqrt(2) * step);
    CHECK(distance(out, expected) < 2 * std::sqrt(5) * step);

    // Rows that nobody attends to may hold anything.
    auto with_nan = keys16;
    for (int column = 0; column < rows; ++column) {
      if (std::find(used.begin(), used.end(), column) == used.end()) {
        std::fill_n(with_nan.begin() + column * kWidth, kWidth, std::uint16_t{0x7fc0});
      }
    }
    auto again = out;
    t.keys = with_nan.data();
    t.output = again.data();
    layer.run(t, pool, kernels());
    CHECK(again == out);
  }
}

void test_masks() {
  const SmallLayer small;
  const Layer layer(small.config, small.weights, small.frequencies.data());
  ThreadPool pool(1);
  static constexpr int kTokens = 2, kRows = 3, kWidth = SmallLayer::kWidth;
  const std::uint16_t no = to_bf16(kMasked);
  auto status = [&](const std::vector<std::uint16_t>& mask, int out_row = 3,
                    std::uint32_t index = 3, int value_row = -1) {
    std::vector<std::uint16_t> keys((kRows + kTokens) * kWidth), values(keys), x(kTokens * kHidden);
    std::vector<std::uint16_t> new_values(kTokens * kWidth), out(x);
    const std::uint32_t indices[] = {index, 4};
    std::uint16_t* keys_out = keys.data() + out_row * kWidth;
    auto* values_out = value_row < 0 ? new_values.data() : values.data() + value_row * kWidth;
    const LayerTensors t{kTokens,  kRows,       keys.data(), values.data(), indices,
                         x.data(), mask.data(), keys_out,    values_out,    out.data()};
    try {
      layer.run(t, pool, kernels());
    } catch (const Problem& problem) {
      return problem.kind;
    }
    return Kind::kOther;  // none
  };
  CHECK(status({0, 0, 0, 0, no, 0, 0, 0, 0, 0}) == Kind::kOther);
  CHECK(status({0, no, no, 0, no, 0, no, no, 0, 0}) == Kind::kOther);
  CHECK(status({0, no, 0, 0, no, 0, 0, 0, 0, 0}) == Kind::kMask);       // leaves one out
  CHECK(status({0, 0, 0, no, 0, 0, 0, 0, 0, no}) == Kind::kMask);       // sees the future
  CHECK(status({0, 0, 0, 0, no, no, no, no, no, no}) == Kind::kOther);  // a padded row
  CHECK(status(std::vector(kTokens * (kRows + kTokens), no)) == Kind::kMask);
  CHECK(status({1, 0, 0, 0, no, 0, 0, 0, 0, 0}) == Kind::kMask);
  CHECK(status({0, 0, 0, 0, to_bf16(-99), 0, 0, 0, 0, 0}) == Kind::kMask);
  // New keys on a row of the cache: only if it is not attended to.
  CHECK(status({0, no, no, 0, no, 0, no, no, 0, 0}, 1) == Kind::kOther);
  CHECK(status({0, 0, no, 0, no, 0, 0, no, 0, 0}, 1) == Kind::kOverlap);
  CHECK(status({0, 0, no, 0, no, 0, 0, no, 0, 0}, 3, 3, 1) == Kind::kOverlap);
  CHECK(status({0, 0, 0, 0, no, 0, 0, 0, 0, 0}, kRows, 1 << 20) == Kind::kValue);
}

// --- the card ----------------------------------------------------------------------------------

void test_card() {
  const Post made;
  const auto file = made.file.bytes();
  void *memory = nullptr, *in = nullptr, *out = nullptr;
  axclrtContext device_context = nullptr;
  CHECK_STATUS(axclrtGetCurrentContext(&device_context), Kind::kHandle);
  CHECK_STATUS(axclrtMalloc(&memory, 1, 2), Kind::kHandle);
  CHECK(axclrtSetDevice(0) == 0 && axclrtGetCurrentContext(&device_context) == 0);
  CHECK(axclrtMalloc(&memory, file.size(), 2) == 0);
  const auto to_device = AXCL_MEMCPY_HOST_TO_DEVICE, to_host = AXCL_MEMCPY_DEVICE_TO_HOST;
  CHECK(axclrtMemcpy(memory, file.data(), file.size(), to_device) == 0);
  CHECK_STATUS(axclrtMemcpy(memory, file.data(), file.size() + 1, to_device), Kind::kBeyond);
  CHECK_STATUS(axclrtMemcpy(memory, file.data(), 1, to_host), Kind::kAddress);
  CHECK_STATUS(axclrtMemcpy(memory, memory, 1, to_device), Kind::kAddress);
  CHECK_STATUS(axclrtMemcpy(memory, nullptr, 1, to_device), Kind::kAddress);
  CHECK_STATUS(axclrtMemcpy(memory, file.data(), 1, static_cast<axclrtMemcpyKind>(4)),
               Kind::kValue);
  std::uint64_t model = 0, context = 0;
  CHECK(axclrtEngineLoadFromMem(memory, file.size(), &model) == 0);
  CHECK(axclrtFree(memory) == 0);
  CHECK_STATUS(axclrtFree(memory), Kind::kAddress);
  CHECK_STATUS(axclrtEngineLoadFromFile("/does/not/exist", &context), Kind::kModel);
  CHECK(axclrtEngineCreateContext(model, &context) == 0);
  axclrtEngineIOInfo info = nullptr;
  axclrtEngineIO io = nullptr;
  CHECK(axclrtEngineGetIOInfo(model, &info) == 0 && axclrtEngineCreateIO(info, &io) == 0);
  CHECK(axclrtEngineGetInputSizeByIndex(info, 0, 0) == kHidden * 2);
  CHECK(axclrtMalloc(&in, kHidden * 2, 0) == 0 && axclrtMalloc(&out, kVocabulary * 2, 0) == 0);
  CHECK_STATUS(axclrtEngineExecute(model, context, 0, io), Kind::kTensors);
  // Another thread needs the context, too.
  std::thread([&] {
    CHECK_STATUS(axclrtEngineExecute(model, context, 0, io), Kind::kHandle);
    CHECK(axclrtSetCurrentContext(device_context) == 0);
    CHECK_STATUS(axclrtEngineExecute(model, context, 0, io), Kind::kTensors);
  }).join();
  CHECK(axclrtEngineSetInputBufferByIndex(io, 0, in, kHidden * 2) == 0);
  CHECK(axclrtEngineSetOutputBufferByIndex(io, 0, out, kVocabulary * 2) == 0);
  CHECK_STATUS(axclrtEngineSetOutputBufferByIndex(io, 1, out, kVocabulary * 2), Kind::kValue);
  const auto x = narrow(normal(kHidden));
  std::vector<std::uint16_t> logits(kVocabulary), board_logits(kVocabulary);
  CHECK(axclrtMemcpy(in, x.data(), kHidden * 2, to_device) == 0);
  CHECK(axclrtEngineExecute(model, context, 0, io) == 0);
  CHECK(axclrtMemcpy(logits.data(), out, kVocabulary * 2, to_host) == 0);
  CHECK(axclrtEngineSetInputBufferByIndex(io, 0, x.data(), kHidden * 2) == 0);  // the host's
  CHECK(axclrtEngineExecute(model, context, 0, io) != 0);

  // The same numbers as on board.
  const Loaded post(file);
  Cmm board_in(kHidden * 2), board_out(kVocabulary * 2);
  std::memcpy(board_in.cpu, x.data(), kHidden * 2);
  CHECK(board_in.flush() == 0 && post.run({board_in.buffer()}, {board_out.buffer()}) == 0);
  CHECK(board_out.invalidate() == 0);
  std::memcpy(board_logits.data(), board_out.cpu, kVocabulary * 2);
  CHECK(logits == board_logits && logits[0] != 0);

  CHECK(axclrtFree(in) == 0 && axclrtFree(out) == 0 && axclrtEngineDestroyIO(io) == 0);
  CHECK(axclrtEngineUnload(model) == 0);
  CHECK_STATUS(axclrtEngineExecute(model, context, 0, io), Kind::kHandle);
}

}  // namespace

int main() {
  std::uint64_t* handle = nullptr;
  CHECK_STATUS(AX_ENGINE_CreateHandleV2(&handle, "", 1, nullptr), Kind::kNotInitialized);
  test_settings();
  AX_ENGINE_NPU_ATTR attributes = {};
  CHECK(AX_ENGINE_GetVNPUAttr(&attributes) != 0);
  CHECK(AX_SYS_Init() == 0 && AX_ENGINE_Init(&attributes) == 0 && axclrtEngineInit(0) == 0);
  CHECK(AX_ENGINE_GetVNPUAttr(&attributes) == 0);
  test_memory();
  test_allocation();
  test_description();
  test_run();
  test_damaged();
  test_layer();
  test_masks();
  test_card();
  CHECK(counters().cmm_bytes == 0 && counters().weight_bytes == 0);
  CHECK(counters().blocks == 0 && counters().models == 0);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

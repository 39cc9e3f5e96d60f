// The Python module edgevl._native; src/edgevl/_native.pyi says what it offers.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "model/decoder.h"
#include "model/measure.h"
#include "model/pack.h"
#include "model/rows.h"
#include "model/vision.h"
#include "threads/thread_pool.h"

namespace nb = nanobind;

namespace edgevl {
namespace {

using Array = nb::ndarray<nb::ro>;
using Floats = nb::ndarray<nb::numpy, float>;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

/// Whether an array lies in the order of C without gaps.
bool is_contiguous(const Array& array) {
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected) return false;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

/// The data of an array of some type and number of dimensions, C-contiguous in main memory.
template <class T>
const T* data(const Array& array, const std::string& name, std::size_t ndim) {
  const auto type = nb::dtype<T>();
  // float16 may come as such or as its bits.
  const bool half = std::is_same_v<T, std::uint16_t> && array.dtype().bits == 16 &&
                    array.dtype().code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float);
  if (array.dtype() != type && !half) {
    fail(name + " has the wrong dtype: " + std::to_string(8 * sizeof(T)) + "-bit " +
         (std::is_floating_point_v<T> ? "floating point" : "integers") + " are expected");
  }
  if (array.ndim() != ndim) {
    fail(name + " has " + std::to_string(array.ndim()) + " dimensions, expected " +
         std::to_string(ndim));
  }
  if (!is_contiguous(array) || array.device_type() != nb::device::cpu::value) {
    fail(name + " is not C-contiguous in main memory");
  }
  const auto* address = static_cast<const T*>(array.data());
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) fail(name + " is not aligned");
  return address;
}

/// A dimension as int; larger ones than any of ours are refused.
int size_of(const Array& array, std::size_t dimension, const std::string& name) {
  const auto size = array.shape(dimension);
  if (size > (std::size_t{1} << 30)) fail(name + " is too large");
  return static_cast<int>(size);
}

template <class T>
T cast(nb::handle value, const std::string& name) {
  T result;
  if (!nb::try_cast<T>(value, result)) fail(name + " has the wrong type");
  return result;
}

/// Packed weights: a matrix whose data is all there.
Matrix packed_matrix(const std::string& format, int rows, int cols, int group, const Array& array,
                     const std::string& name) {
  const auto* bytes = data<std::uint8_t>(array, name, 1);
  const Matrix matrix = describe(parse_format(format), rows, cols, group, bytes);
  if (array.size() != matrix.bytes()) {
    fail(name + " has " + std::to_string(array.size()) + " bytes, expected " +
         std::to_string(matrix.bytes()));
  }
  if (reinterpret_cast<std::uintptr_t>(bytes) % kLineBytes != 0) {
    fail(name + " is not aligned to " + std::to_string(kLineBytes) + " bytes");
  }
  return matrix;
}

PlainMatrix plain_matrix(const std::string& dtype, const Array& array, const std::string& name) {
  const Dtype type = parse_dtype(dtype);
  const void* address = type == Dtype::kF32
                            ? static_cast<const void*>(data<float>(array, name, 2))
                            : static_cast<const void*>(data<std::uint16_t>(array, name, 2));
  return {type, size_of(array, 0, name), size_of(array, 1, name), address};
}

/// A model's settings and tensors, by name; keeps the arrays it hands out alive.
class Source {
 public:
  Source(nb::dict config, nb::dict tensors) : config_(config), tensors_(tensors) {}

  template <class T>
  T setting(const char* name) const {
    if (!config_.contains(name)) fail(std::string("config has no ") + name);
    return cast<T>(config_[name], std::string("config: ") + name);
  }

  /// float32 [size].
  const float* vector(const std::string& name, std::size_t size) { return floats(name, {size}); }

  /// The same, or null where there is none.
  const float* optional_vector(const std::string& name, std::size_t size) {
    return tensors_.contains(name.c_str()) ? vector(name, size) : nullptr;
  }

  /// float32 [rows, cols].
  const float* rows(const std::string& name, std::size_t rows, std::size_t cols) {
    return floats(name, {rows, cols});
  }

  /// A packed matrix and the bias `bias`, which may be missing.
  Linear linear(const std::string& name, const std::string& bias) {
    const auto parts = tuple(name, {5});
    Linear linear;
    linear.matrix = packed_matrix(cast<std::string>(parts[0], name), cast<int>(parts[1], name),
                                  cast<int>(parts[2], name), cast<int>(parts[3], name),
                                  keep(parts[4], name), name);
    linear.bias = optional_vector(bias, linear.matrix.rows);
    return linear;
  }
  Linear linear(const std::string& name) { return linear(name, name + "_bias"); }

  bool has(const char* name) const { return tensors_.contains(name); }

  /// Rows in memory, or in a file.
  Rows rows(const char* name) {
    const auto parts = tuple(name, {2, 6});
    const auto dtype = cast<std::string>(parts[0], name);
    if (parts.size() == 2) return plain_matrix(dtype, keep(parts[1], name), name);
    const auto offset = cast<std::int64_t>(parts[4], name);
    if (offset < 0) fail(std::string("tensors: ") + name + " has a negative offset");
    return {parse_dtype(dtype),
            cast<int>(parts[1], name),
            cast<int>(parts[2], name),
            cast<int>(parts[3], name),
            offset,
            cast<nb::bytes>(parts[5], name).c_str()};
  }

  /// Refuses tensors that nobody has asked for: a model that has them computes something else.
  void require_all_used() const {
    for (const auto& [key, value] : tensors_) {
      const auto name = cast<std::string>(key, "tensors: a name");
      if (!used_.contains(name)) fail("tensors: " + name + " is not one of the model's");
    }
  }

  std::vector<Array> take_arrays() { return std::move(arrays_); }

 private:
  nb::object tensor(const std::string& name) {
    if (!tensors_.contains(name.c_str())) fail("tensors: " + name + " is missing");
    used_.insert(name);
    return tensors_[name.c_str()];
  }

  const float* floats(const std::string& name, const std::vector<std::size_t>& shape) {
    const auto array = keep(tensor(name), name);
    const float* address = data<float>(array, name, shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (array.shape(i) != shape[i]) {
        fail("tensors: " + name + " has size " + std::to_string(array.shape(i)) + ", expected " +
             std::to_string(shape[i]));
      }
    }
    return address;
  }

  nb::tuple tuple(const std::string& name, std::initializer_list<std::size_t> sizes) {
    const auto parts = cast<nb::tuple>(tensor(name), "tensors: " + name);
    if (std::find(sizes.begin(), sizes.end(), parts.size()) == sizes.end()) {
      fail("tensors: " + name + " is a tuple of " + std::to_string(parts.size()));
    }
    return parts;
  }

  Array keep(nb::handle value, const std::string& name) {
    arrays_.push_back(cast<Array>(value, "tensors: " + name));
    return arrays_.back();
  }

  nb::dict config_, tensors_;
  std::set<std::string> used_;
  std::vector<Array> arrays_;
};

CacheFormat parse_cache_format(const std::string& name) {
  if (name == "bf16") return CacheFormat::kBf16;
  if (name == "int8") return CacheFormat::kInt8;
  fail("config: kv_cache is '" + name + "'");
}

DecoderConfig decoder_config(const Source& source) {
  DecoderConfig config;
  config.hidden_size = source.setting<int>("hidden_size");
  config.intermediate_size = source.setting<int>("intermediate_size");
  config.num_hidden_layers = source.setting<int>("num_hidden_layers");
  config.num_attention_heads = source.setting<int>("num_attention_heads");
  config.num_key_value_heads = source.setting<int>("num_key_value_heads");
  config.head_dim = source.setting<int>("head_dim");
  config.vocab_size = source.setting<int>("vocab_size");
  config.max_context = source.setting<int>("max_context");
  config.chunk = source.setting<int>("chunk");
  config.rms_norm_eps = source.setting<float>("rms_norm_eps");
  config.kv_cache = parse_cache_format(source.setting<std::string>("kv_cache"));
  return config;
}

DecoderWeights decoder_weights(Source& source, const DecoderConfig& config) {
  DecoderWeights weights;
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const std::string name = "layers." + std::to_string(i) + ".";
    DecoderLayer layer;
    layer.input_norm = source.vector(name + "input_norm", config.hidden_size);
    layer.qkv = source.linear(name + "qkv");
    layer.q_norm = source.optional_vector(name + "q_norm", config.head_dim);
    layer.k_norm = source.optional_vector(name + "k_norm", config.head_dim);
    layer.o = source.linear(name + "o");
    layer.post_norm = source.vector(name + "post_norm", config.hidden_size);
    layer.gate_up = source.linear(name + "gate_up");
    layer.down = source.linear(name + "down");
    weights.layers.push_back(layer);
  }
  weights.embedding = source.rows("embedding");
  weights.norm = source.vector("norm", config.hidden_size);
  weights.head = source.linear("head");
  if (source.has("head_exact")) weights.head_exact = source.rows("head_exact");
  weights.inverse_frequencies = source.vector("inverse_frequencies", config.head_dim / 2);
  return weights;
}

VisionConfig vision_config(const Source& source) {
  VisionConfig config;
  config.hidden_size = source.setting<int>("hidden_size");
  config.intermediate_size = source.setting<int>("intermediate_size");
  config.num_hidden_layers = source.setting<int>("num_hidden_layers");
  config.num_attention_heads = source.setting<int>("num_attention_heads");
  config.image_size = source.setting<int>("image_size");
  config.patch_size = source.setting<int>("patch_size");
  const auto norm = source.setting<std::string>("norm_type");
  if (norm != "layer_norm" && norm != "rms_norm") fail("config: norm_type is '" + norm + "'");
  config.layer_norm = norm == "layer_norm";
  config.norm_eps = source.setting<float>("norm_eps");
  config.downsample = source.setting<int>("downsample");
  const auto shuffle = source.setting<std::string>("ps_version");
  if (shuffle != "v1" && shuffle != "v2") fail("config: ps_version is '" + shuffle + "'");
  config.swapped_shuffle = shuffle == "v1";
  config.text_hidden_size = source.setting<int>("text_hidden_size");
  config.projector_norm_eps = source.setting<float>("projector_norm_eps");
  check(config);
  return config;
}

/// A model and the Python objects it points into.
template <class Model>
struct Held {
  Held(Source source, nb::object held_pool, const std::string& isa)
      : pool(std::move(held_pool)),
        model(make(source, nb::cast<ThreadPool&>(pool), kernels(isa))),
        arrays(source.take_arrays()) {}

  static std::unique_ptr<Model> make(Source& source, ThreadPool& pool, const Kernels& kernels) {
    if constexpr (std::is_same_v<Model, Decoder>) {
      const auto config = decoder_config(source);
      check(config);
      auto weights = decoder_weights(source, config);
      source.require_all_used();
      return std::make_unique<Decoder>(config, std::move(weights), pool, kernels);
    } else {
      const auto config = vision_config(source);
      auto weights = read_vision_weights(source, config);
      source.require_all_used();
      return std::make_unique<VisionEncoder>(config, std::move(weights), pool, kernels);
    }
  }

  nb::object pool;
  std::unique_ptr<Model> model;
  std::vector<Array> arrays;
};

using HeldDecoder = Held<Decoder>;
using HeldVision = Held<VisionEncoder>;

/// An array over a new or shared buffer, which lives as long as the array.
template <class T>
nb::ndarray<nb::numpy, T> numpy(std::shared_ptr<Buffer<T>> buffer,
                                std::initializer_list<std::size_t> shape) {
  T* address = buffer->data();
  auto* shared = new std::shared_ptr<Buffer<T>>(std::move(buffer));
  nb::capsule owner(shared, [](void* pointer) noexcept {
    delete static_cast<std::shared_ptr<Buffer<T>>*>(pointer);
  });
  return {address, shape, owner};
}

Floats new_array(std::shared_ptr<Buffer<float>>& buffer, std::initializer_list<std::size_t> shape) {
  std::size_t size = 1;
  for (const auto n : shape) size *= n;
  buffer = std::make_shared<Buffer<float>>(size);
  return numpy(buffer, shape);
}

std::span<const std::int64_t> token_ids(const Array& ids) {
  return {data<std::int64_t>(ids, "token_ids", 1), ids.shape(0)};
}

Floats embed(HeldDecoder& self, const Array& ids) {
  const auto tokens = token_ids(ids);
  std::shared_ptr<Buffer<float>> out;
  auto array =
      new_array(out, {tokens.size(), static_cast<std::size_t>(self.model->config().hidden_size)});
  nb::gil_scoped_release release;
  self.model->embed(tokens, out->data());
  return array;
}

nb::ndarray<nb::numpy, std::uint32_t> save(HeldDecoder& self, const Sequence& cache, int length) {
  auto out = std::make_shared<Buffer<std::uint32_t>>(self.model->words(cache, length));
  {
    nb::gil_scoped_release release;
    self.model->save(cache, length, out->data());
  }
  return numpy(out, {out->size()});
}

void load(HeldDecoder& self, Sequence& cache, const Array& words, int length) {
  const auto* address = data<std::uint32_t>(words, "words", 1);
  nb::gil_scoped_release release;
  self.model->load(cache, address, words.size(), length);
}

/// A cache, what is appended to it (embeddings [T, H], or token ids [T]), and how many of the last
/// positions' logits are wanted.
using PythonPart = std::tuple<nb::object, Array, int>;

Floats step(HeldDecoder& self, const std::vector<PythonPart>& given) {
  const int hidden = self.model->config().hidden_size;
  std::vector<Part> parts;
  for (const auto& [cache, inputs, wanted] : given) {  // which holds the caches until the end
    if (!nb::isinstance<Sequence>(cache)) fail("a part has no cache");
    Part part{nb::cast<Sequence*>(cache), nullptr, nullptr, 0, wanted};
    if (inputs.ndim() == 1) {
      part.ids = token_ids(inputs).data();
    } else {
      part.embeddings = data<float>(inputs, "embeddings", 2);
      if (size_of(inputs, 1, "embeddings") != hidden) {
        fail("embeddings have size " + std::to_string(inputs.shape(1)) + ", expected " +
             std::to_string(hidden));
      }
    }
    part.count = size_of(inputs, 0, "inputs");
    parts.push_back(part);
  }
  const auto logits = [&] {
    nb::gil_scoped_release release;
    return self.model->step(parts);
  }();
  return numpy(logits.buffer, {static_cast<std::size_t>(logits.rows),
                               static_cast<std::size_t>(logits.vocab_size)});
}

Floats encode(HeldVision& self, const Array& pixels) {
  const auto& config = self.model->config();
  const float* address = data<float>(pixels, "pixels", 4);
  const int tiles = size_of(pixels, 0, "pixels");
  const auto side = static_cast<std::size_t>(config.image_size);
  if (pixels.shape(1) != 3 || pixels.shape(2) != side || pixels.shape(3) != side) {
    fail("pixels are not [tiles, 3, " + std::to_string(side) + ", " + std::to_string(side) + "]");
  }
  std::shared_ptr<Buffer<float>> out;
  auto array = new_array(
      out, {static_cast<std::size_t>(tiles), static_cast<std::size_t>(config.image_tokens()),
            static_cast<std::size_t>(config.text_hidden_size)});
  nb::gil_scoped_release release;
  self.model->encode(address, tiles, out->data());
  return array;
}

/// The array that weights are packed into, as the matrix that fills it.
std::pair<Matrix, std::uint8_t*> target(Format format, int cols, int group,
                                        nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig>& out) {
  Matrix matrix = describe(format, 1, cols, group);
  const std::size_t pair = matrix.bytes();  // of panels, as all rows are padded to
  if (out.size() == 0 || out.size() % pair != 0 || out.size() / pair > 1 << 20) {
    fail("out has " + std::to_string(out.size()) + " bytes, expected a multiple of " +
         std::to_string(pair));
  }
  if (reinterpret_cast<std::uintptr_t>(out.data()) % kLineBytes != 0) {
    fail("out is not aligned to " + std::to_string(kLineBytes) + " bytes");
  }
  matrix.rows = static_cast<int>(out.size() / pair) * 2 * kLanes;
  return {matrix, out.data()};
}

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig>;

void pack_plain(const std::string& format, const Array& weight, const std::string& dtype, int group,
                Bytes out, int first_panel, int panel_step, ThreadPool& pool) {
  const PlainMatrix source = plain_matrix(dtype, weight, "weight");
  const auto [matrix, address] = target(parse_format(format), source.cols, group, out);
  nb::gil_scoped_release release;
  pack(source, matrix, address, {first_panel, panel_step}, pool);
}

void pack_gptq(const Array& qweight, const Array& scales, int group, Bytes out, int first_panel,
               int panel_step, ThreadPool& pool) {
  GptqMatrix source;
  source.words = reinterpret_cast<const std::uint32_t*>(data<std::int32_t>(qweight, "qweight", 2));
  if (qweight.shape(0) > 1 << 21) fail("qweight is too large");
  source.cols = 8 * size_of(qweight, 0, "qweight");
  source.rows = size_of(qweight, 1, "qweight");
  source.group = group;
  source.scale_dtype = scales.dtype().bits == 16 ? Dtype::kF16 : Dtype::kF32;
  source.scales = source.scale_dtype == Dtype::kF16
                      ? static_cast<const void*>(data<std::uint16_t>(scales, "scales", 2))
                      : static_cast<const void*>(data<float>(scales, "scales", 2));
  const auto [matrix, address] = target(Format::kInt4, source.cols, group, out);
  if (size_of(scales, 0, "scales") != matrix.groups() ||
      size_of(scales, 1, "scales") != source.rows) {
    fail("scales are not [" + std::to_string(matrix.groups()) + ", " + std::to_string(source.rows) +
         "]");
  }
  nb::gil_scoped_release release;
  pack(source, matrix, address, {first_panel, panel_step}, pool);
}

Floats unpack_matrix(const std::string& format, const Array& bytes, int rows, int cols, int group) {
  const Matrix matrix = packed_matrix(format, rows, cols, group, bytes, "data");
  std::shared_ptr<Buffer<float>> out;
  auto array = new_array(out, {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)});
  nb::gil_scoped_release release;
  unpack(matrix, cols, out->data());
  return array;
}

/// Memory to read from is kept between calls, so that they measure no page faults.
double measure_bandwidth(ThreadPool& pool, std::size_t bytes, const std::string& isa) {
  static std::mutex mutex;
  static Buffer<std::uint8_t> memory;
  const Kernels& table = kernels(isa);
  if (bytes < 1 << 16 || bytes > std::size_t{1} << 36) fail("bytes is not 64 KiB to 64 GiB");
  nb::gil_scoped_release release;
  std::lock_guard lock(mutex);
  if (memory.size() != bytes) {
    memory = Buffer<std::uint8_t>();
    memory = Buffer<std::uint8_t>(bytes);
    std::fill_n(memory.data(), bytes, std::uint8_t{1});  // pages that are not all the zero page
  }
  return read_bandwidth(pool, table, memory);
}

double measure_int8_rate(ThreadPool& pool, const std::string& isa) {
  const Kernels& table = kernels(isa);
  nb::gil_scoped_release release;
  return int8_rate(pool, table);
}

/// A file's errors become OSError(errno, reason, file).
void translate_file_error(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const FileError& error) {
    const auto name = nb::steal(PyUnicode_DecodeFSDefault(error.file.c_str()));
    const auto arguments = nb::make_tuple(error.code().value(), error.reason, name);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace
}  // namespace edgevl

NB_MODULE(_native, m) {
  using namespace edgevl;
  using namespace nb::literals;

  nb::register_exception_translator(&translate_file_error);
  nb::set_leak_warnings(false);  // what is still referenced when the interpreter exits is no leak

  m.def("instruction_sets", &instruction_sets);
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("size", &ThreadPool::size);

  m.def(
      "padded_cols",
      [](const std::string& format, int cols, int group) {
        return describe(parse_format(format), 1, cols, group).cols;
      },
      "format"_a, "cols"_a, "group"_a);
  m.def(
      "packed_bytes",
      [](const std::string& format, int rows, int cols, int group) {
        return describe(parse_format(format), rows, cols, group).bytes();
      },
      "format"_a, "rows"_a, "cols"_a, "group"_a);
  m.def(
      "product_bytes",
      [](const std::string& format, int rows, int cols, int group) {
        return describe(parse_format(format), rows, cols, group).panels_bytes();
      },
      "format"_a, "rows"_a, "cols"_a, "group"_a);
  m.def("pack", &pack_plain, "format"_a, "weight"_a, "dtype"_a, "group"_a, "out"_a.noconvert(),
        "first_panel"_a, "panel_step"_a, "pool"_a);
  m.def("pack_gptq", &pack_gptq, "qweight"_a, "scales"_a, "group"_a, "out"_a.noconvert(),
        "first_panel"_a, "panel_step"_a, "pool"_a);
  m.def("unpack", &unpack_matrix, "format"_a, "data"_a, "rows"_a, "cols"_a, "group"_a);

  nb::class_<Sequence>(m, "Cache")
      .def_prop_ro("length", [](const Sequence& self) { return self.cache.length(); })
      .def_prop_ro("bytes", [](const Sequence& self) { return self.cache.bytes(); })
      .def("truncate", [](Sequence& self, int length) { self.cache.truncate(length); }, "length"_a);
  nb::class_<HeldDecoder>(m, "Decoder")
      .def(
          "__init__",
          [](HeldDecoder* self, nb::dict config, nb::dict tensors, nb::object pool,
             const std::string& isa) {
            if (!nb::isinstance<ThreadPool>(pool)) fail("pool is not a ThreadPool");
            new (self) HeldDecoder(Source(config, tensors), pool, isa);
          },
          "config"_a, "tensors"_a, "pool"_a, "isa"_a = "")
      .def(
          "new_cache", [](HeldDecoder& self) { return self.model->new_sequence().release(); },
          nb::rv_policy::take_ownership)
      .def(
          "share",
          [](HeldDecoder& self, Sequence& cache, const Sequence& other, int length) {
            nb::gil_scoped_release release;
            self.model->share(cache, other, length);
          },
          "cache"_a, "other"_a, "length"_a)
      .def("save", &save, "cache"_a, "length"_a)
      .def("load", &load, "cache"_a, "words"_a, "length"_a)
      .def("embed", &embed, "ids"_a)
      .def("step", &step, "parts"_a);
  nb::class_<HeldVision>(m, "VisionEncoder")
      .def(
          "__init__",
          [](HeldVision* self, nb::dict config, nb::dict tensors, nb::object pool,
             const std::string& isa) {
            if (!nb::isinstance<ThreadPool>(pool)) fail("pool is not a ThreadPool");
            new (self) HeldVision(Source(config, tensors), pool, isa);
          },
          "config"_a, "tensors"_a, "pool"_a, "isa"_a = "")
      .def("encode", &encode, "pixels"_a);

  m.def("read_bandwidth", &measure_bandwidth, "pool"_a, "bytes"_a, "isa"_a = "");
  m.def("int8_rate", &measure_int8_rate, "pool"_a, "isa"_a = "");
}

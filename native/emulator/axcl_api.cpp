// libaxcl_rt.so: a card that is this process, see axcl_api.h.

#include "emulator/axcl_api.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "emulator/board.h"
#include "emulator/model.h"

using namespace edgevl::emulator;

namespace {

using Kind = Problem::Kind;
using Counters = EDGEVL_EMULATOR_COUNTERS;
using Tensors = std::vector<TensorInfo>;

constexpr std::int32_t kDevice = 0;

/// The tensors' places of a run.
struct Io {
  std::vector<Place> inputs, outputs;
};

/// Things by what programs know them as.
struct Registry {
  std::mutex mutex;
  std::map<std::uint64_t, std::shared_ptr<Model>> models;
  std::map<void*, std::shared_ptr<Model>> infos;
  std::map<void*, std::shared_ptr<Io>> ios;
  std::map<std::uint64_t, std::uint64_t> contexts;  ///< of models
  std::set<std::uint64_t> device_contexts;
  std::uint64_t next = 1;
};

Registry& registry() {
  static Registry& registry = *new Registry;  // see Board::get
  return registry;
}

thread_local std::uint64_t current_context = 0;
bool engine_initialized = false;
std::int32_t engine_kind = 0;

template <class Key, class T>
T find(const std::map<Key, T>& map, Key key, const char* what) {
  std::lock_guard lock(registry().mutex);
  const auto found = map.find(key);
  if (found == map.end()) throw Problem(Kind::kHandle, std::string(what) + " does not exist");
  return found->second;
}

std::shared_ptr<Model> find_model(std::uint64_t id) {
  return find(registry().models, id, "the model");
}
std::shared_ptr<Model> find_info(void* info) { return find(registry().infos, info, "the io info"); }
std::shared_ptr<Io> find_io(void* io) { return find(registry().ios, io, "the io"); }

void require_device(std::int32_t device) {
  Board::get().require_initialized();
  if (device != kDevice) {
    throw Problem(Kind::kHandle, "there is no device " + std::to_string(device));
  }
}

/// Contexts are each thread's own.
void require_context() {
  Board::get().require_initialized();
  if (current_context == 0) {
    throw Problem(Kind::kHandle,
                  "the thread has no context: call axclrtSetDevice or axclrtSetCurrentContext");
  }
}

std::uint64_t address(const void* device) { return reinterpret_cast<std::uintptr_t>(device); }

std::uint64_t add_model(std::span<const std::uint8_t> data) {
  require_context();
  if (!engine_initialized) throw Problem(Kind::kNotInitialized, "call axclrtEngineInit first");
  auto model = std::make_shared<Model>(data);
  std::lock_guard lock(registry().mutex);
  const auto id = registry().next++;
  registry().models.emplace(id, std::move(model));
  return id;
}

/// A file's bytes while they are read.
class Mapped {
 public:
  explicit Mapped(const char* path) {
    const int file = ::open(path, O_RDONLY | O_CLOEXEC);
    struct stat status = {};
    if (file >= 0 && ::fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<std::size_t>(status.st_size);
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int error = errno;
    if (file >= 0) ::close(file);
    if (data_ == MAP_FAILED) {
      throw Problem(Kind::kModel, std::string(path) + ": cannot be read" +
                                      (error ? std::string(": ") + std::strerror(error) : ""));
    }
  }
  ~Mapped() { ::munmap(data_, size_); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  std::span<const std::uint8_t> bytes() const {
    return {static_cast<const std::uint8_t*>(data_), size_};
  }

 private:
  void* data_ = MAP_FAILED;
  std::size_t size_ = 0;
};

const TensorInfo& tensor(const Tensors& tensors, std::uint32_t index) {
  if (index >= tensors.size()) {
    throw Problem(Kind::kValue, "there is no tensor " + std::to_string(index));
  }
  return tensors[index];
}

void get_dims(const TensorInfo& tensor, axclrtEngineIODims* dims) {
  auto& out = required(dims, "dims");
  out.dimCount = static_cast<std::int32_t>(tensor.shape.size());
  std::copy(tensor.shape.begin(), tensor.shape.end(), out.dims);
}

axclrtEngineDataType data_type(Type type) {
  switch (type) {
    case Type::kU8: return AXCL_DATA_TYPE_UINT8;
    case Type::kI32: return AXCL_DATA_TYPE_INT32;
    case Type::kU32: return AXCL_DATA_TYPE_UINT32;
    case Type::kBf16: return AXCL_DATA_TYPE_BF16;
    default: return AXCL_DATA_TYPE_FP32;
  }
}

Place& place(std::vector<Place>& places, std::uint32_t index) {
  if (index >= places.size()) {
    throw Problem(Kind::kValue, "there is no tensor " + std::to_string(index));
  }
  return places[index];
}

std::int32_t allocate(const char* function, void** device, std::size_t bytes) {
  return guarded(function, [&] {
    require_context();
    auto& out = required(device, "the pointer");
    out = reinterpret_cast<void*>(Board::get().allocate(bytes, 0, true).address);
  });
}

/// One side of a copy, as this process sees it.
std::uint8_t* side(const void* pointer, std::size_t bytes, bool on_device, const char* what) {
  const auto& memory = Board::get().memory();
  if (on_device) return memory.view(address(pointer), bytes, what);
  if (!pointer || memory.is_address(address(pointer))) {
    throw Problem(Kind::kAddress, std::string(what) + " is " + hex(address(pointer)) +
                                      ", which is not in the host's memory");
  }
  return static_cast<std::uint8_t*>(const_cast<void*>(pointer));
}

}  // namespace

// --- runtime, devices, contexts ---

int32_t axclInit(const char*) {
  return guarded(__func__, [] { Board::get().initialize(); });
}

int32_t axclFinalize(void) {
  return guarded(__func__, [] { Board::get().finalize(); });
}

int32_t axclrtGetVersion(int32_t* major, int32_t* minor, int32_t* patch) {
  return guarded(__func__, [&] {
    required(major, "major") = required(minor, "minor") = required(patch, "patch") = 0;
  });
}

const char* axclrtGetSocName(void) { return "EdgeVL emulator"; }

int32_t axclrtGetDeviceList(axclrtDeviceList* list) {
  return guarded(__func__, [&] {
    auto& out = required(list, "the list");
    out.num = 1;
    out.devices[0] = kDevice;
  });
}

int32_t axclrtSetDevice(int32_t device) {
  return guarded(__func__, [&] {
    require_device(device);
    std::lock_guard lock(registry().mutex);
    if (current_context == 0)
      registry().device_contexts.insert(current_context = registry().next++);
  });
}

int32_t axclrtResetDevice(int32_t device) {
  return guarded(__func__, [&] { require_device(device); });
}

int32_t axclrtCreateContext(axclrtContext* context, int32_t device) {
  return guarded(__func__, [&] {
    require_device(device);
    auto& out = required(context, "the context");
    std::lock_guard lock(registry().mutex);
    current_context = registry().next++;
    registry().device_contexts.insert(current_context);
    out = reinterpret_cast<void*>(current_context);
  });
}

int32_t axclrtDestroyContext(axclrtContext context) {
  return guarded(__func__, [&] {
    std::lock_guard lock(registry().mutex);
    if (registry().device_contexts.erase(address(context)) == 0) {
      throw Problem(Kind::kHandle, "the context does not exist");
    }
  });
}

int32_t axclrtSetCurrentContext(axclrtContext context) {
  return guarded(__func__, [&] {
    std::lock_guard lock(registry().mutex);
    if (!registry().device_contexts.contains(address(context))) {
      throw Problem(Kind::kHandle, "the context does not exist");
    }
    current_context = address(context);
  });
}

int32_t axclrtGetCurrentContext(axclrtContext* context) {
  return guarded(__func__, [&] {
    require_context();
    required(context, "the context") = reinterpret_cast<void*>(current_context);
  });
}

int32_t axclrtGetDefaultContext(axclrtContext* context, int32_t device) {
  return axclrtCreateContext(context, device);
}

// --- memory ---

int32_t axclrtMalloc(void** device, size_t bytes, int32_t) {
  return allocate(__func__, device, bytes);
}

int32_t axclrtMallocCached(void** device, size_t bytes, int32_t) {
  return allocate(__func__, device, bytes);
}

int32_t axclrtMemcpy(void* to, const void* from, size_t bytes, axclrtMemcpyKind kind) {
  return guarded(__func__, [&] {
    require_context();
    Board& board = Board::get();
    board.count(&Counters::memcpys);
    board.count(&Counters::memcpy_bytes, bytes);
    if (kind < AXCL_MEMCPY_HOST_TO_HOST || kind > AXCL_MEMCPY_DEVICE_TO_DEVICE) {
      throw Problem(Kind::kValue, "kind " + std::to_string(kind) + " is not emulated");
    }
    const bool from_device =
        kind == AXCL_MEMCPY_DEVICE_TO_HOST || kind == AXCL_MEMCPY_DEVICE_TO_DEVICE;
    const bool to_device =
        kind == AXCL_MEMCPY_HOST_TO_DEVICE || kind == AXCL_MEMCPY_DEVICE_TO_DEVICE;
    const auto* source = side(from, bytes, from_device, "the source");
    auto* target = side(to, bytes, to_device, "the target");
    std::memmove(target, source, bytes);
  });
}

int32_t axclrtFree(void* device) {
  return guarded(__func__, [&] {
    require_context();
    Board::get().free(address(device), nullptr);
  });
}

int32_t axclrtMemFlush(void* device, size_t bytes) {
  return guarded(__func__, [&] {
    Board& board = Board::get();
    board.count(&Counters::flushes);
    board.count(&Counters::flushed_bytes, bytes);
    board.memory().view(address(device), bytes, "the range");
  });
}

int32_t axclrtGetMemInfo(axclrtMemAttr attribute, size_t* free, size_t* total) {
  return guarded(__func__, [&] {
    require_context();
    if (attribute != AXCL_DDR_CMM) throw Problem(Kind::kValue, "CMM is all that is emulated");
    if (free) *free = Board::get().free_bytes();
    if (total) *total = Board::get().settings().cmm_bytes;
  });
}

// --- models ---

int32_t axclrtEngineInit(int32_t kind) {
  return guarded(__func__, [&] {
    Board::get().require_initialized();
    engine_kind = kind;
    engine_initialized = true;
  });
}

int32_t axclrtEngineGetVNpuKind(int32_t* kind) {
  return guarded(__func__, [&] {
    if (!engine_initialized) throw Problem(Kind::kNotInitialized, "call axclrtEngineInit first");
    required(kind, "the kind") = engine_kind;
  });
}

int32_t axclrtEngineFinalize(void) {
  engine_initialized = false;
  return 0;
}

int32_t axclrtEngineLoadFromFile(const char* path, uint64_t* model) {
  return guarded(__func__, [&] {
    const Mapped file(&required(path, "the path"));
    required(model, "the model") = add_model(file.bytes());
  });
}

int32_t axclrtEngineLoadFromMem(const void* device, uint64_t bytes, uint64_t* model) {
  return guarded(__func__, [&] {
    const auto* data = Board::get().memory().view(address(device), bytes, "the model");
    required(model, "the model") = add_model({data, bytes});
  });
}

const char* axclrtEngineGetModelCompilerVersion(uint64_t model) {
  const char* version = "";
  guarded(__func__, [&] {
    find_model(model);
    version = "EdgeVL emulator";
  });
  return version;
}

int32_t axclrtEngineUnload(uint64_t model) {
  return guarded(__func__, [&] {
    require_context();
    const auto found = find_model(model);
    std::lock_guard lock(registry().mutex);
    registry().models.erase(model);
    registry().infos.erase(found.get());
    std::erase_if(registry().contexts, [&](const auto& entry) { return entry.second == model; });
  });
}

int32_t axclrtEngineGetIOInfo(uint64_t model, axclrtEngineIOInfo* info) {
  return guarded(__func__, [&] {
    const auto found = find_model(model);
    std::lock_guard lock(registry().mutex);
    registry().infos[found.get()] = found;
    required(info, "the io info") = found.get();
  });
}

int32_t axclrtEngineGetShapeGroupsCount(axclrtEngineIOInfo info, int32_t* count) {
  return guarded(__func__, [&] {
    required(count, "the count") = static_cast<std::int32_t>(find_info(info)->groups().size());
  });
}

uint32_t axclrtEngineGetNumInputs(axclrtEngineIOInfo info) {
  std::size_t count = 0;
  guarded(__func__, [&] { count = find_info(info)->group(0).inputs.size(); });
  return static_cast<std::uint32_t>(count);
}

uint32_t axclrtEngineGetNumOutputs(axclrtEngineIOInfo info) {
  std::size_t count = 0;
  guarded(__func__, [&] { count = find_info(info)->group(0).outputs.size(); });
  return static_cast<std::uint32_t>(count);
}

uint64_t axclrtEngineGetInputSizeByIndex(axclrtEngineIOInfo info, uint32_t group, uint32_t index) {
  std::size_t size = 0;
  guarded(__func__, [&] { size = tensor(find_info(info)->group(group).inputs, index).bytes(); });
  return size;
}

uint64_t axclrtEngineGetOutputSizeByIndex(axclrtEngineIOInfo info, uint32_t group, uint32_t index) {
  std::size_t size = 0;
  guarded(__func__, [&] { size = tensor(find_info(info)->group(group).outputs, index).bytes(); });
  return size;
}

int32_t axclrtEngineGetInputDims(axclrtEngineIOInfo info, uint32_t group, uint32_t index,
                                 axclrtEngineIODims* dims) {
  return guarded(__func__,
                 [&] { get_dims(tensor(find_info(info)->group(group).inputs, index), dims); });
}

int32_t axclrtEngineGetOutputDims(axclrtEngineIOInfo info, uint32_t group, uint32_t index,
                                  axclrtEngineIODims* dims) {
  return guarded(__func__,
                 [&] { get_dims(tensor(find_info(info)->group(group).outputs, index), dims); });
}

const char* axclrtEngineGetInputNameByIndex(axclrtEngineIOInfo info, uint32_t index) {
  const char* name = "";
  guarded(__func__, [&] { name = tensor(find_info(info)->group(0).inputs, index).name.c_str(); });
  return name;
}

const char* axclrtEngineGetOutputNameByIndex(axclrtEngineIOInfo info, uint32_t index) {
  const char* name = "";
  guarded(__func__, [&] { name = tensor(find_info(info)->group(0).outputs, index).name.c_str(); });
  return name;
}

int32_t axclrtEngineGetInputDataType(axclrtEngineIOInfo info, uint32_t index,
                                     axclrtEngineDataType* type) {
  return guarded(__func__, [&] {
    required(type, "the type") = data_type(tensor(find_info(info)->group(0).inputs, index).type);
  });
}

int32_t axclrtEngineGetOutputDataType(axclrtEngineIOInfo info, uint32_t index,
                                      axclrtEngineDataType* type) {
  return guarded(__func__, [&] {
    required(type, "the type") = data_type(tensor(find_info(info)->group(0).outputs, index).type);
  });
}

int32_t axclrtEngineGetInputDataLayout(axclrtEngineIOInfo info, uint32_t index, int32_t* layout) {
  return guarded(__func__, [&] {
    tensor(find_info(info)->group(0).inputs, index);
    required(layout, "the layout") = 0;
  });
}

int32_t axclrtEngineGetOutputDataLayout(axclrtEngineIOInfo info, uint32_t index, int32_t* layout) {
  return guarded(__func__, [&] {
    tensor(find_info(info)->group(0).outputs, index);
    required(layout, "the layout") = 0;
  });
}

int32_t axclrtEngineCreateIO(axclrtEngineIOInfo info, axclrtEngineIO* io) {
  return guarded(__func__, [&] {
    const auto& group = find_info(info)->group(0);
    auto made = std::make_shared<Io>();
    made->inputs.resize(group.inputs.size());
    made->outputs.resize(group.outputs.size());
    auto& out = required(io, "the io");
    std::lock_guard lock(registry().mutex);
    out = made.get();
    registry().ios.emplace(out, std::move(made));
  });
}

int32_t axclrtEngineDestroyIO(axclrtEngineIO io) {
  return guarded(__func__, [&] {
    const auto found = find_io(io);
    std::lock_guard lock(registry().mutex);
    registry().ios.erase(io);
  });
}

int32_t axclrtEngineSetInputBufferByIndex(axclrtEngineIO io, uint32_t index, const void* device,
                                          uint64_t bytes) {
  return guarded(__func__,
                 [&] { place(find_io(io)->inputs, index) = {address(device), nullptr, bytes}; });
}

int32_t axclrtEngineSetOutputBufferByIndex(axclrtEngineIO io, uint32_t index, const void* device,
                                           uint64_t bytes) {
  return guarded(__func__,
                 [&] { place(find_io(io)->outputs, index) = {address(device), nullptr, bytes}; });
}

int32_t axclrtEngineGetInputBufferByIndex(axclrtEngineIO io, uint32_t index, void** device,
                                          uint64_t* bytes) {
  return guarded(__func__, [&] {
    const auto at = place(find_io(io)->inputs, index);
    required(device, "the pointer") = reinterpret_cast<void*>(at.address);
    required(bytes, "the size") = at.bytes;
  });
}

int32_t axclrtEngineGetOutputBufferByIndex(axclrtEngineIO io, uint32_t index, void** device,
                                           uint64_t* bytes) {
  return guarded(__func__, [&] {
    const auto at = place(find_io(io)->outputs, index);
    required(device, "the pointer") = reinterpret_cast<void*>(at.address);
    required(bytes, "the size") = at.bytes;
  });
}

int32_t axclrtEngineCreateContext(uint64_t model, uint64_t* context) {
  return guarded(__func__, [&] {
    find_model(model);
    auto& out = required(context, "the context");
    std::lock_guard lock(registry().mutex);
    out = registry().next++;
    registry().contexts.emplace(out, model);
  });
}

int32_t axclrtEngineExecute(uint64_t model, uint64_t context, uint32_t group, axclrtEngineIO io) {
  return guarded(__func__, [&] {
    require_context();
    const auto found = find_model(model);
    if (find(registry().contexts, context, "the context") != model) {
      throw Problem(Kind::kHandle, "the context is another model's");
    }
    const auto places = find_io(io);
    found->run(group, places->inputs, places->outputs, true);
  });
}

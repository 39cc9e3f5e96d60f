// libax_engine.so: models, see npu_api.h.

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <vector>

#include "emulator/board.h"
#include "emulator/model.h"
#include "emulator/npu_api.h"

using namespace edgevl::emulator;

namespace {

using Kind = Problem::Kind;

/// A model with its description as the interface has it.
class Handle {
 public:
  explicit Handle(std::span<const std::uint8_t> data) : model(data) {
    for (const auto& group : model.groups()) {
      auto& info = infos_.emplace_back();
      info.pInputs = describe(group.inputs);
      info.nInputSize = static_cast<std::uint32_t>(group.inputs.size());
      info.pOutputs = describe(group.outputs);
      info.nOutputSize = static_cast<std::uint32_t>(group.outputs.size());
      info.nMaxBatchSize = 1;
    }
  }

  AX_ENGINE_IO_INFO* info(std::size_t group) {
    model.group(group);
    return &infos_[group];
  }

  Model model;
  std::set<std::unique_ptr<std::uint64_t>> contexts;
  std::uint32_t cores = 1;

 private:
  AX_ENGINE_IO_META* describe(const std::vector<TensorInfo>& tensors) {
    auto& metas = metas_.emplace_back(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto& tensor = tensors[i];
      metas[i].pName = const_cast<char*>(tensor.name.c_str());
      metas[i].pShape = const_cast<std::int32_t*>(tensor.shape.data());
      metas[i].nShapeSize = static_cast<std::uint8_t>(tensor.shape.size());
      metas[i].eDataType = type(tensor.type);
      metas[i].nSize = static_cast<std::uint32_t>(tensor.bytes());
    }
    return metas.data();
  }

  static AX_ENGINE_DATA_TYPE type(Type type) {
    switch (type) {
      case Type::kU8: return AX_ENGINE_DT_UINT8;
      case Type::kI32: return AX_ENGINE_DT_SINT32;
      case Type::kU32: return AX_ENGINE_DT_UINT32;
      case Type::kBf16: return AX_ENGINE_DT_BFLOAT16;
      default: return AX_ENGINE_DT_FLOAT32;
    }
  }

  std::vector<AX_ENGINE_IO_INFO> infos_;
  std::vector<std::vector<AX_ENGINE_IO_META>> metas_;
};

std::mutex mutex;
std::map<const void*, std::shared_ptr<Handle>>& handles() {
  static auto& handles = *new std::map<const void*, std::shared_ptr<Handle>>;  // see Board::get
  return handles;
}
bool initialized = false;
AX_ENGINE_NPU_ATTR attributes = {};

std::shared_ptr<Handle> find(const std::uint64_t* handle) {
  std::lock_guard lock(mutex);
  const auto found = handles().find(handle);
  if (found == handles().end()) {
    throw Problem(Kind::kHandle,
                  hex(reinterpret_cast<std::uintptr_t>(handle)) + " is the handle of no model");
  }
  return found->second;
}

void require_initialized() {
  Board::get().require_initialized();
  if (!initialized) throw Problem(Kind::kNotInitialized, "call AX_ENGINE_Init first");
}

std::vector<Place> places(const AX_ENGINE_IO_BUFFER* buffers, std::uint32_t count) {
  std::vector<Place> places;
  for (const auto& buffer : std::span(buffers, buffers ? std::min(count, 64u) : 0)) {
    places.push_back({buffer.phyAddr, buffer.pVirAddr, buffer.nSize});
  }
  return places;
}

void run(std::uint64_t* handle, std::uint64_t* context, std::uint32_t group, AX_ENGINE_IO* io) {
  require_initialized();
  const auto found = find(handle);
  {
    std::lock_guard lock(mutex);
    const auto& contexts = found->contexts;
    if (std::none_of(contexts.begin(), contexts.end(),
                     [&](const auto& known) { return known.get() == context; })) {
      throw Problem(Kind::kHandle,
                    hex(reinterpret_cast<std::uintptr_t>(context)) + " is no context of the model");
    }
  }
  required(io, "the table of tensors");
  found->model.run(group, places(io->pInputs, io->nInputSize),
                   places(io->pOutputs, io->nOutputSize), false);
}

}  // namespace

const char* AX_ENGINE_GetVersion(void) { return "EdgeVL emulator"; }

void AX_ENGINE_NPUReset(void) {}

int32_t AX_ENGINE_Init(AX_ENGINE_NPU_ATTR* attr) {
  return guarded(__func__, [&] {
    Board::get().require_initialized();
    attributes = required(attr, "the attribute");
    initialized = true;
  });
}

int32_t AX_ENGINE_GetVNPUAttr(AX_ENGINE_NPU_ATTR* attr) {
  // Programs ask to find out whether somebody has initialized: no problem if nobody has.
  if (!initialized || !attr) return Problem(Kind::kNotInitialized, "").status();
  *attr = attributes;
  return 0;
}

int32_t AX_ENGINE_Deinit(void) {
  initialized = false;
  return 0;
}

int32_t AX_ENGINE_GetModelType(const void* data, uint32_t bytes, int32_t* type) {
  return guarded(__func__, [&] {
    const auto* begin = &required(static_cast<const std::uint8_t*>(data), "the model");
    ModelFile({begin, bytes});
    required(type, "the type") = 0;
  });
}

int32_t AX_ENGINE_CreateHandleV2(uint64_t** handle, const void* data, uint32_t bytes, void*) {
  return guarded(__func__, [&] {
    require_initialized();
    auto& out = required(handle, "the handle");
    const auto* begin = &required(static_cast<const std::uint8_t*>(data), "the model");
    auto made = std::make_shared<Handle>(std::span(begin, bytes));
    out = reinterpret_cast<std::uint64_t*>(made.get());
    std::lock_guard lock(mutex);
    handles().emplace(out, std::move(made));
  });
}

int32_t AX_ENGINE_DestroyHandle(uint64_t* handle) {
  return guarded(__func__, [&] {
    const auto found = find(handle);
    std::lock_guard lock(mutex);
    handles().erase(handle);
  });
}

int32_t AX_ENGINE_GetIOInfo(uint64_t* handle, AX_ENGINE_IO_INFO** info) {
  return guarded(__func__, [&] { required(info, "the description") = find(handle)->info(0); });
}

int32_t AX_ENGINE_GetGroupIOInfoCount(uint64_t* handle, uint32_t* count) {
  return guarded(__func__, [&] {
    required(count, "the count") = static_cast<std::uint32_t>(find(handle)->model.groups().size());
  });
}

int32_t AX_ENGINE_GetGroupIOInfo(uint64_t* handle, uint32_t group, AX_ENGINE_IO_INFO** info) {
  return guarded(__func__, [&] { required(info, "the description") = find(handle)->info(group); });
}

int32_t AX_ENGINE_GetHandleModelType(uint64_t* handle, int32_t* type) {
  return guarded(__func__, [&] {
    find(handle);
    required(type, "the type") = 0;
  });
}

int32_t AX_ENGINE_CreateContextV2(uint64_t* handle, uint64_t** context) {
  return guarded(__func__, [&] {
    const auto found = find(handle);
    auto& out = required(context, "the context");
    std::lock_guard lock(mutex);
    out = found->contexts.insert(std::make_unique<std::uint64_t>(0)).first->get();
  });
}

int32_t AX_ENGINE_RunSyncV2(uint64_t* handle, uint64_t* context, AX_ENGINE_IO* io) {
  return guarded(__func__, [&] { run(handle, context, 0, io); });
}

int32_t AX_ENGINE_RunGroupIOSync(uint64_t* handle, uint64_t* context, uint32_t group,
                                 AX_ENGINE_IO* io) {
  return guarded(__func__, [&] { run(handle, context, group, io); });
}

int32_t AX_ENGINE_SetAffinity(uint64_t* handle, uint32_t cores) {
  return guarded(__func__, [&] { find(handle)->cores = cores; });
}

int32_t AX_ENGINE_GetAffinity(uint64_t* handle, uint32_t* cores) {
  return guarded(__func__, [&] { required(cores, "the cores") = find(handle)->cores; });
}

int32_t AX_ENGINE_GetCMMUsage(uint64_t* handle, AX_ENGINE_CMM_INFO* usage) {
  return guarded(__func__, [&] {
    required(usage, "the usage").nCMMSize =
        static_cast<std::uint32_t>(find(handle)->model.weight_bytes());
  });
}

const char* AX_ENGINE_GetModelToolsVersion(uint64_t* handle) {
  const char* version = "";
  guarded(__func__, [&] {
    find(handle);
    version = "EdgeVL emulator";
  });
  return version;
}

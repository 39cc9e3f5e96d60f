// The C interface of Axera's on-board runtime, as far as programs for language models use it:
// names, numbers and layouts of libax_sys.so and libax_engine.so on 64-bit machines.

#pragma once

#include <stdint.h>

#include "emulator/export.h"

extern "C" {

// --- libax_sys.so: memory. Functions return 0, or what went wrong. ---

EDGEVL_EXPORT int32_t AX_SYS_Init(void);
EDGEVL_EXPORT int32_t AX_SYS_Deinit(void);
EDGEVL_EXPORT int32_t AX_SYS_MemAllocCached(unsigned long long* address, void** cpu, uint32_t bytes,
                                            uint32_t align, const signed char* token);
EDGEVL_EXPORT int32_t AX_SYS_MemFree(unsigned long long address, void* cpu);
EDGEVL_EXPORT int32_t AX_SYS_MflushCache(unsigned long long address, void* cpu, uint32_t bytes);
EDGEVL_EXPORT int32_t AX_SYS_MinvalidateCache(unsigned long long address, void* cpu,
                                              uint32_t bytes);

// --- libax_engine.so: models ---

enum AX_ENGINE_DATA_TYPE : int32_t {
  AX_ENGINE_DT_UINT8 = 1,
  AX_ENGINE_DT_FLOAT32 = 3,
  AX_ENGINE_DT_SINT32 = 6,
  AX_ENGINE_DT_UINT32 = 7,
  AX_ENGINE_DT_BFLOAT16 = 9,
};

struct AX_ENGINE_NPU_ATTR {
  int32_t eHardMode;
  uint32_t reserve[8];
};

/// A tensor of a model.
struct AX_ENGINE_IO_META {
  char* pName;
  int32_t* pShape;
  uint8_t nShapeSize;
  int32_t eLayout;
  int32_t eMemoryType;
  AX_ENGINE_DATA_TYPE eDataType;
  void* pExtraMeta;
  uint32_t nSize;
  uint32_t nQuantizationValue;
  int32_t* pStride;
  uint64_t u64Reserved[9];
};

/// The tensors of a shape group.
struct AX_ENGINE_IO_INFO {
  AX_ENGINE_IO_META* pInputs;
  uint32_t nInputSize;
  AX_ENGINE_IO_META* pOutputs;
  uint32_t nOutputSize;
  uint32_t nMaxBatchSize;
  int32_t bDynamicBatchSize;
  uint64_t u64Reserved[11];
};

/// Where a tensor lies.
struct AX_ENGINE_IO_BUFFER {
  uint64_t phyAddr;
  void* pVirAddr;
  uint32_t nSize;
  int32_t* pStride;
  uint8_t nStrideSize;
  uint64_t u64Reserved[11];
};

/// The tensors of a run. The vendor's Python binding declares 8 bytes less, so the last are not
/// read.
struct AX_ENGINE_IO {
  AX_ENGINE_IO_BUFFER* pInputs;
  uint32_t nInputSize;
  AX_ENGINE_IO_BUFFER* pOutputs;
  uint32_t nOutputSize;
  uint32_t nBatchSize;
  void* pIoSetting;
  uint64_t u64Reserved[11];
};

struct AX_ENGINE_CMM_INFO {
  uint32_t nCMMSize;
};

EDGEVL_EXPORT const char* AX_ENGINE_GetVersion(void);
EDGEVL_EXPORT void AX_ENGINE_NPUReset(void);
EDGEVL_EXPORT int32_t AX_ENGINE_Init(AX_ENGINE_NPU_ATTR* attributes);
EDGEVL_EXPORT int32_t AX_ENGINE_GetVNPUAttr(AX_ENGINE_NPU_ATTR* attributes);
EDGEVL_EXPORT int32_t AX_ENGINE_Deinit(void);
EDGEVL_EXPORT int32_t AX_ENGINE_GetModelType(const void* data, uint32_t bytes, int32_t* type);
EDGEVL_EXPORT int32_t AX_ENGINE_CreateHandleV2(uint64_t** handle, const void* data, uint32_t bytes,
                                               void* extra);
EDGEVL_EXPORT int32_t AX_ENGINE_DestroyHandle(uint64_t* handle);
EDGEVL_EXPORT int32_t AX_ENGINE_GetIOInfo(uint64_t* handle, AX_ENGINE_IO_INFO** info);
EDGEVL_EXPORT int32_t AX_ENGINE_GetGroupIOInfoCount(uint64_t* handle, uint32_t* count);
EDGEVL_EXPORT int32_t AX_ENGINE_GetGroupIOInfo(uint64_t* handle, uint32_t group,
                                               AX_ENGINE_IO_INFO** info);
EDGEVL_EXPORT int32_t AX_ENGINE_GetHandleModelType(uint64_t* handle, int32_t* type);
EDGEVL_EXPORT int32_t AX_ENGINE_CreateContextV2(uint64_t* handle, uint64_t** context);
EDGEVL_EXPORT int32_t AX_ENGINE_RunSyncV2(uint64_t* handle, uint64_t* context, AX_ENGINE_IO* io);
EDGEVL_EXPORT int32_t AX_ENGINE_RunGroupIOSync(uint64_t* handle, uint64_t* context, uint32_t group,
                                               AX_ENGINE_IO* io);
EDGEVL_EXPORT int32_t AX_ENGINE_SetAffinity(uint64_t* handle, uint32_t cores);
EDGEVL_EXPORT int32_t AX_ENGINE_GetAffinity(uint64_t* handle, uint32_t* cores);
EDGEVL_EXPORT int32_t AX_ENGINE_GetCMMUsage(uint64_t* handle, AX_ENGINE_CMM_INFO* usage);
EDGEVL_EXPORT const char* AX_ENGINE_GetModelToolsVersion(uint64_t* handle);

}  // extern "C"

static_assert(sizeof(AX_ENGINE_IO_META) == 128 && sizeof(AX_ENGINE_IO_INFO) == 128 &&
              sizeof(AX_ENGINE_IO_BUFFER) == 128 && sizeof(AX_ENGINE_IO) == 128);

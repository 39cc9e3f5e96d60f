// The C interface of AXCL, the runtime of Axera's M.2 cards, as far as programs for language models
// use it: names, numbers and layouts of libaxcl_rt.so on 64-bit machines.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "emulator/export.h"

extern "C" {

typedef void* axclrtContext;
typedef void* axclrtEngineIOInfo;
typedef void* axclrtEngineIO;

struct axclrtDeviceList {
  uint32_t num;
  int32_t devices[256];
};

enum axclrtMemcpyKind : int32_t {
  AXCL_MEMCPY_HOST_TO_HOST = 0,
  AXCL_MEMCPY_HOST_TO_DEVICE = 1,
  AXCL_MEMCPY_DEVICE_TO_HOST = 2,
  AXCL_MEMCPY_DEVICE_TO_DEVICE = 3,
};

enum axclrtMemAttr : int32_t {
  AXCL_DDR_CMM = 0,
};

enum axclrtEngineDataType : int32_t {
  AXCL_DATA_TYPE_UINT8 = 4,
  AXCL_DATA_TYPE_INT32 = 7,
  AXCL_DATA_TYPE_UINT32 = 8,
  AXCL_DATA_TYPE_BF16 = 14,
  AXCL_DATA_TYPE_FP32 = 15,
};

struct axclrtEngineIODims {
  int32_t dimCount;
  int32_t dims[32];
};

EDGEVL_EXPORT int32_t axclInit(const char* config);
EDGEVL_EXPORT int32_t axclFinalize(void);
EDGEVL_EXPORT int32_t axclrtGetVersion(int32_t* major, int32_t* minor, int32_t* patch);
EDGEVL_EXPORT const char* axclrtGetSocName(void);
EDGEVL_EXPORT int32_t axclrtGetDeviceList(axclrtDeviceList* list);
EDGEVL_EXPORT int32_t axclrtSetDevice(int32_t device);
EDGEVL_EXPORT int32_t axclrtResetDevice(int32_t device);
EDGEVL_EXPORT int32_t axclrtCreateContext(axclrtContext* context, int32_t device);
EDGEVL_EXPORT int32_t axclrtDestroyContext(axclrtContext context);
EDGEVL_EXPORT int32_t axclrtSetCurrentContext(axclrtContext context);
EDGEVL_EXPORT int32_t axclrtGetCurrentContext(axclrtContext* context);
EDGEVL_EXPORT int32_t axclrtGetDefaultContext(axclrtContext* context, int32_t device);

EDGEVL_EXPORT int32_t axclrtMalloc(void** device, size_t bytes, int32_t policy);
EDGEVL_EXPORT int32_t axclrtMallocCached(void** device, size_t bytes, int32_t policy);
EDGEVL_EXPORT int32_t axclrtMemcpy(void* to, const void* from, size_t bytes, axclrtMemcpyKind kind);
EDGEVL_EXPORT int32_t axclrtFree(void* device);
EDGEVL_EXPORT int32_t axclrtMemFlush(void* device, size_t bytes);
EDGEVL_EXPORT int32_t axclrtGetMemInfo(axclrtMemAttr attribute, size_t* free, size_t* total);

EDGEVL_EXPORT int32_t axclrtEngineInit(int32_t kind);
EDGEVL_EXPORT int32_t axclrtEngineGetVNpuKind(int32_t* kind);
EDGEVL_EXPORT int32_t axclrtEngineFinalize(void);
EDGEVL_EXPORT int32_t axclrtEngineLoadFromFile(const char* path, uint64_t* model);
EDGEVL_EXPORT int32_t axclrtEngineLoadFromMem(const void* device, uint64_t bytes, uint64_t* model);
EDGEVL_EXPORT const char* axclrtEngineGetModelCompilerVersion(uint64_t model);
EDGEVL_EXPORT int32_t axclrtEngineUnload(uint64_t model);
EDGEVL_EXPORT int32_t axclrtEngineGetIOInfo(uint64_t model, axclrtEngineIOInfo* info);
EDGEVL_EXPORT int32_t axclrtEngineGetShapeGroupsCount(axclrtEngineIOInfo info, int32_t* count);
EDGEVL_EXPORT uint32_t axclrtEngineGetNumInputs(axclrtEngineIOInfo info);
EDGEVL_EXPORT uint32_t axclrtEngineGetNumOutputs(axclrtEngineIOInfo info);
EDGEVL_EXPORT uint64_t axclrtEngineGetInputSizeByIndex(axclrtEngineIOInfo info, uint32_t group,
                                                       uint32_t index);
EDGEVL_EXPORT uint64_t axclrtEngineGetOutputSizeByIndex(axclrtEngineIOInfo info, uint32_t group,
                                                        uint32_t index);
EDGEVL_EXPORT int32_t axclrtEngineGetInputDims(axclrtEngineIOInfo info, uint32_t group,
                                               uint32_t index, axclrtEngineIODims* dims);
EDGEVL_EXPORT int32_t axclrtEngineGetOutputDims(axclrtEngineIOInfo info, uint32_t group,
                                                uint32_t index, axclrtEngineIODims* dims);
EDGEVL_EXPORT const char* axclrtEngineGetInputNameByIndex(axclrtEngineIOInfo info, uint32_t index);
EDGEVL_EXPORT const char* axclrtEngineGetOutputNameByIndex(axclrtEngineIOInfo info, uint32_t index);
EDGEVL_EXPORT int32_t axclrtEngineGetInputDataType(axclrtEngineIOInfo info, uint32_t index,
                                                   axclrtEngineDataType* type);
EDGEVL_EXPORT int32_t axclrtEngineGetOutputDataType(axclrtEngineIOInfo info, uint32_t index,
                                                    axclrtEngineDataType* type);
EDGEVL_EXPORT int32_t axclrtEngineGetInputDataLayout(axclrtEngineIOInfo info, uint32_t index,
                                                     int32_t* layout);
EDGEVL_EXPORT int32_t axclrtEngineGetOutputDataLayout(axclrtEngineIOInfo info, uint32_t index,
                                                      int32_t* layout);
EDGEVL_EXPORT int32_t axclrtEngineCreateIO(axclrtEngineIOInfo info, axclrtEngineIO* io);
EDGEVL_EXPORT int32_t axclrtEngineDestroyIO(axclrtEngineIO io);
EDGEVL_EXPORT int32_t axclrtEngineSetInputBufferByIndex(axclrtEngineIO io, uint32_t index,
                                                        const void* device, uint64_t bytes);
EDGEVL_EXPORT int32_t axclrtEngineSetOutputBufferByIndex(axclrtEngineIO io, uint32_t index,
                                                         const void* device, uint64_t bytes);
EDGEVL_EXPORT int32_t axclrtEngineGetInputBufferByIndex(axclrtEngineIO io, uint32_t index,
                                                        void** device, uint64_t* bytes);
EDGEVL_EXPORT int32_t axclrtEngineGetOutputBufferByIndex(axclrtEngineIO io, uint32_t index,
                                                         void** device, uint64_t* bytes);
EDGEVL_EXPORT int32_t axclrtEngineCreateContext(uint64_t model, uint64_t* context);
EDGEVL_EXPORT int32_t axclrtEngineExecute(uint64_t model, uint64_t context, uint32_t group,
                                          axclrtEngineIO io);

}  // extern "C"

// What an emulated board did, for tests and measurements. Plain C: also read by other languages.

#pragma once

#include <stdint.h>

#include "emulator/export.h"

extern "C" {

/// Totals since the process began or the last reset. Bytes are those that were asked for, whether
/// or not the emulator had anything to copy.
struct EDGEVL_EMULATOR_COUNTERS {
  uint64_t runs;
  uint64_t flushes;
  uint64_t invalidates;
  uint64_t memcpys;
  uint64_t allocations;
  uint64_t flushed_bytes;
  uint64_t invalidated_bytes;
  uint64_t memcpy_bytes;
  uint64_t problems;        ///< calls that were refused
  uint64_t emulator_ns;     ///< spent in the emulator, by all threads together
  uint64_t npu_ns;          ///< what the runs would take on the board, as their files say: emulated
  uint64_t cmm_bytes;       ///< allocated now; not reset
  uint64_t cmm_peak_bytes;  ///< allocated and weights, at most
  uint64_t weight_bytes;    ///< of the models that are loaded now; not reset
  uint64_t blocks;          ///< allocations that are not freed; not reset
  uint64_t models;          ///< that are loaded now; not reset
};

/// All are found through any of the libraries.
EDGEVL_EXPORT void EDGEVL_EMULATOR_Counters(struct EDGEVL_EMULATOR_COUNTERS* counters);
EDGEVL_EXPORT void EDGEVL_EMULATOR_ResetCounters(void);
/// What is free of the emulated CMM, and all of it, in bytes.
EDGEVL_EXPORT void EDGEVL_EMULATOR_Memory(uint64_t* free, uint64_t* total);

}  // extern "C"

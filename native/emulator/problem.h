// What a program did wrong, or what cannot be done for it.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "emulator/export.h"

namespace edgevl::emulator {

/// Thrown by everything in the emulator; its functions for programs return status().
class EDGEVL_EXPORT Problem : public std::runtime_error {
 public:
  enum class Kind : std::uint8_t {
    kOther,
    kSetting,         ///< of the environment
    kNotInitialized,  ///< called before the function that initializes
    kAddress,         ///< in no allocation, or in one that was freed
    kCpuAddress,      ///< another than that of the physical address
    kBeyond,          ///< a range goes on after the end of its allocation
    kUnaligned,
    kUnflushed,    ///< the NPU would read what was written before
    kDirtyOutput,  ///< what was written would fall on the NPU's output later
    kDiscarded,    ///< invalidating throws away what was written
    kTensors,      ///< their number or size
    kOverlap,      ///< of an output and what is read or written in the same run
    kMask,         ///< not causal
    kValue,        ///< of an argument or an input
    kModel,        ///< damaged, or not one of the emulator's
    kHandle,       ///< of no model, context or device
    kNoMemory,
  };

  Problem(Kind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}

  /// What functions for programs return: never 0.
  std::int32_t status() const {
    return static_cast<std::int32_t>(0x80060000u + static_cast<std::uint32_t>(kind) + 1);
  }

  Kind kind;
};

/// An address, or a size, as messages have it.
EDGEVL_EXPORT std::string hex(std::uint64_t number);

}  // namespace edgevl::emulator

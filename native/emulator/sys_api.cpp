// libax_sys.so: memory, see npu_api.h.

#include "emulator/board.h"
#include "emulator/npu_api.h"

using edgevl::emulator::Board;
using edgevl::emulator::guarded;
using edgevl::emulator::required;
using Counters = EDGEVL_EMULATOR_COUNTERS;

int32_t AX_SYS_Init(void) {
  return guarded(__func__, [] { Board::get().initialize(); });
}

int32_t AX_SYS_Deinit(void) {
  return guarded(__func__, [] { Board::get().finalize(); });
}

int32_t AX_SYS_MemAllocCached(unsigned long long* address, void** cpu, uint32_t bytes,
                              uint32_t align, const signed char*) {
  return guarded(__func__, [&] {
    auto& out = required(address, "the physical address");
    auto& out_cpu = required(cpu, "the virtual address");
    const auto allocated = Board::get().allocate(bytes, align, false);
    out = allocated.address;
    out_cpu = allocated.cpu;
  });
}

int32_t AX_SYS_MemFree(unsigned long long address, void* cpu) {
  return guarded(__func__, [&] { Board::get().free(address, cpu); });
}

int32_t AX_SYS_MflushCache(unsigned long long address, void* cpu, uint32_t bytes) {
  return guarded(__func__, [&] {
    Board& board = Board::get();
    board.count(&Counters::flushes);
    board.count(&Counters::flushed_bytes, bytes);
    board.memory().flush(address, cpu, bytes);
  });
}

int32_t AX_SYS_MinvalidateCache(unsigned long long address, void* cpu, uint32_t bytes) {
  return guarded(__func__, [&] {
    Board& board = Board::get();
    board.count(&Counters::invalidates);
    board.count(&Counters::invalidated_bytes, bytes);
    board.memory().invalidate(address, cpu, bytes);
  });
}

// Which implementations were built, which this processor can run, and which one is taken.

#include <cstdlib>
#include <stdexcept>

#include "kernels/instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgevl {
namespace {

#if defined(__x86_64__)

/// Two leaves of CPUID, and which registers the operating system saves.
struct Processor {
  unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;  // leaf 1
  unsigned a7 = 0, b7 = 0, c7 = 0, d7 = 0;  // leaf 7, subleaf 0
  unsigned a71 = 0;                         // leaf 7, subleaf 1
  unsigned saved = 0;

  Processor() {
    unsigned b, c, d;
    __get_cpuid(1, &a1, &b1, &c1, &d1);
    if (__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7) && a7 >= 1) {
      __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    }
    if (c1 & bit_OSXSAVE) asm("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  }

  static bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }
  bool avx2() const { return all(saved, 0x6) && all(c1, bit_FMA | bit_F16C) && all(b7, bit_AVX2); }
  bool avx_vnni() const { return avx2() && all(a71, 1u << 4); }
  bool avx512() const {
    return avx2() && all(saved, 0xe6) &&
           all(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
           all(c7, bit_AVX512VNNI);
  }
  bool avx512_bf16() const { return avx512() && all(a71, 1u << 5); }
};

#elif defined(__aarch64__)

/// Which products there are: SDOT, and SMMLA with BFDOT.
struct Processor {
  bool dot = false, matrix = false;

  Processor() {
#if defined(__linux__)
    dot = getauxval(AT_HWCAP) >> 20 & 1;             // HWCAP_ASIMDDP
    matrix = (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // HWCAP2_I8MM, HWCAP2_BF16
#elif defined(__APPLE__)
    dot = has("hw.optional.arm.FEAT_DotProd");
    matrix = has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16");
#endif
  }

#if defined(__APPLE__)
  static bool has(const char* name) {
    int value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  }
#endif
};

#endif

/// What was built and can run, the best first.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(__aarch64__)
  const Processor processor;
  (void)processor;
#endif
#if defined(EDGEVL_HAVE_AVX512BF16)
  if (processor.avx512_bf16()) found.push_back(&kAvx512Bf16);
#endif
#if defined(EDGEVL_HAVE_AVX512)
  if (processor.avx512()) found.push_back(&kAvx512);
#endif
#if defined(EDGEVL_HAVE_AVXVNNI)
  if (processor.avx_vnni()) found.push_back(&kAvxVnni);
#endif
#if defined(EDGEVL_HAVE_AVX2)
  if (processor.avx2()) found.push_back(&kAvx2);
#endif
#if defined(EDGEVL_HAVE_NEON_I8MM)
  if (processor.dot && processor.matrix) found.push_back(&kNeonI8mm);
#endif
#if defined(EDGEVL_HAVE_NEON)
  if (processor.dot) found.push_back(&kNeon);
#endif
  found.push_back(&kPortable);
  return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* one : usable()) names.push_back(one->name);
  return names;
}

const Kernels& kernels(const std::string& name) {
  std::string wanted = name;
  if (wanted.empty()) {
    if (const char* chosen = std::getenv("EDGEVL_ISA")) wanted = chosen;
  }
  std::string names;
  for (const Kernels* one : usable()) {
    if (wanted.empty() || wanted == one->name) return *one;
    names += names.empty() ? one->name : std::string(", ") + one->name;
  }
  throw std::invalid_argument((name.empty() ? "EDGEVL_ISA" : "isa") + std::string(": '") + wanted +
                              "' is not an instruction set of this machine; use one of " + names);
}

}  // namespace edgevl

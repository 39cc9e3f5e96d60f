#define _FILE_OFFSET_BITS 64  // also where a pointer has 32

#include "model/rows.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace edgevl {

struct Rows::File {
  File(int other, const std::string& name)
      : descriptor(::fcntl(other, F_DUPFD_CLOEXEC, 0)), name(name) {
    if (descriptor < 0) fail(errno);
  }
  ~File() { ::close(descriptor); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  [[noreturn]] void fail(int error) const {
    throw FileError(error, std::generic_category().message(error), name);
  }

  void read(void* out, std::size_t size, std::int64_t offset) const {
    auto* to = static_cast<char*>(out);
    while (size > 0) {
      const auto count = ::pread(descriptor, to, size, offset);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail(errno);
      if (count == 0) {
        throw FileError(EIO,
                        "ends at byte " + std::to_string(offset) +
                            ", it was cut short after it had been opened; restore the file "
                            "and load the model again",
                        name);
      }
      to += count;
      size -= static_cast<std::size_t>(count);
      offset += count;
    }
  }

  int descriptor;
  std::string name;
};

Rows::Rows(Dtype dtype, int rows, int cols, int descriptor, std::int64_t offset,
           const std::string& name)
    : matrix_{dtype, rows, cols},
      file_(std::make_shared<const File>(descriptor, name)),
      offset_(offset) {}

std::size_t Rows::row_bytes() const {
  return static_cast<std::size_t>(cols()) * (dtype() == Dtype::kF32 ? 4 : 2);
}

const void* Rows::stored(int index, void* buffer) const {
  const std::size_t begin = index * row_bytes();
  if (!file_) return static_cast<const char*>(matrix_.data) + begin;
  file_->read(buffer, row_bytes(), offset_ + static_cast<std::int64_t>(begin));
  return buffer;
}

void Rows::row(int index, float* out, void* buffer) const {
  PlainMatrix{dtype(), 1, cols(), stored(index, buffer)}.row(0, out);
}

}  // namespace edgevl

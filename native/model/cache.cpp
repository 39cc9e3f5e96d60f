#include "model/cache.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace edgevl {
namespace {

std::size_t blocks_of(int positions) {
  return (static_cast<std::size_t>(positions) + kCacheBlock - 1) / kCacheBlock;
}

}  // namespace

Cache::Cache(int layers, int kv_heads, int head_dim, CacheFormat format)
    : kv_heads_(kv_heads),
      head_words_(cache_words(head_dim, format)),
      pointers_(static_cast<std::size_t>(layers) * kv_heads * 2) {
  block_words_ = pointers_.size() * head_words_;
}

void Cache::reserve(int positions) {
  while (blocks_.size() < blocks_of(positions)) {
    // All that may throw comes first.
    if (blocks_.size() == blocks_.capacity()) blocks_.reserve(2 * blocks_.size() + 1);
    for (auto& pointers : pointers_) pointers.reserve(blocks_.capacity());
    Buffer<std::uint32_t> block(block_words_);
    for (std::size_t i = 0; i < pointers_.size(); ++i) {
      pointers_[i].push_back(block.data() + i * head_words_);
    }
    blocks_.push_back(std::move(block));
  }
}

void Cache::truncate(int length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("truncate to " + std::to_string(length) + ", but " +
                                std::to_string(length_) + " positions are cached");
  }
  length_ = length;
  // One block more than needed stays: a sequence that goes back and forth over the edge of a block,
  // as speculation does, would allocate and free it again and again.
  const std::size_t kept = blocks_of(length) + 1;
  if (blocks_.size() <= kept) return;
  blocks_.resize(kept);
  for (auto& pointers : pointers_) pointers.resize(kept);
}

}  // namespace edgevl

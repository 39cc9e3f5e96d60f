#include "model/cache.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgevl {
namespace {

std::size_t blocks_of(int positions) {
  return (static_cast<std::size_t>(positions) + kCacheBlock - 1) / kCacheBlock;
}

/// Bytes of blocks that are kept: a thousand positions of a small model.
constexpr std::size_t kMostSpare = std::size_t{128} << 20;

}  // namespace

SpareBlocks::Block SpareBlocks::take(const std::shared_ptr<SpareBlocks>& spare, std::size_t words) {
  if (!spare) return std::make_shared<Buffer<std::uint32_t>>(words);
  std::unique_ptr<Buffer<std::uint32_t>> block;
  {
    std::lock_guard lock(spare->mutex_);
    if (!spare->blocks_.empty()) {
      block = std::make_unique<Buffer<std::uint32_t>>(std::move(spare->blocks_.back()));
      spare->blocks_.pop_back();
      spare->bytes_ -= words * sizeof(std::uint32_t);
    }
  }
  if (block) {
    std::fill_n(block->data(), words, 0);
  } else {
    block = std::make_unique<Buffer<std::uint32_t>>(words);
  }
  return Block(block.release(), [spare](Buffer<std::uint32_t>* old) {
    const std::unique_ptr<Buffer<std::uint32_t>> owned(old);
    spare->keep(std::move(*owned));
  });
}

void SpareBlocks::keep(Buffer<std::uint32_t> block) {
  const std::size_t bytes = block.size() * sizeof(std::uint32_t);
  std::lock_guard lock(mutex_);
  if (bytes_ + bytes > kMostSpare) return;
  try {
    blocks_.push_back(std::move(block));
    bytes_ += bytes;
  } catch (const std::bad_alloc&) {  // then it is not kept
  }
}

Cache::Cache(int layers, int kv_heads, int head_dim, CacheFormat format,
             std::shared_ptr<SpareBlocks> spare)
    : kv_heads_(kv_heads),
      head_words_(cache_words(head_dim, format)),
      spare_(std::move(spare)),
      pointers_(static_cast<std::size_t>(layers) * kv_heads * 2) {
  block_words_ = pointers_.size() * head_words_;
}

void Cache::reserve(int positions) {
  for (std::size_t i = length_ / kCacheBlock; i < blocks_.size(); ++i) {
    if (blocks_[i].use_count() == 1) continue;
    auto copy = SpareBlocks::take(spare_, block_words_);
    std::copy_n(blocks_[i]->data(), block_words_, copy->data());
    blocks_[i] = std::move(copy);
    point_at(i);
  }
  while (blocks_.size() < blocks_of(positions)) {
    // All that may throw comes first.
    if (blocks_.size() == blocks_.capacity()) blocks_.reserve(2 * blocks_.size() + 1);
    for (auto& pointers : pointers_) pointers.reserve(blocks_.capacity());
    auto block = SpareBlocks::take(spare_, block_words_);
    for (auto& pointers : pointers_) pointers.push_back(nullptr);
    blocks_.push_back(std::move(block));
    point_at(blocks_.size() - 1);
  }
}

void Cache::point_at(std::size_t block) {
  for (std::size_t i = 0; i < pointers_.size(); ++i) {
    pointers_[i][block] = blocks_[block]->data() + i * head_words_;
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

void Cache::share(const Cache& other, int length) {
  if (length < 0 || length > other.length_) {
    throw std::invalid_argument("share " + std::to_string(length) + " positions, but " +
                                std::to_string(other.length_) + " are cached");
  }
  const auto count = static_cast<std::ptrdiff_t>(blocks_of(length));
  std::vector<Block> blocks(other.blocks_.begin(), other.blocks_.begin() + count);
  auto pointers = pointers_;
  for (std::size_t i = 0; i < pointers.size(); ++i) {
    pointers[i].assign(other.pointers_[i].begin(), other.pointers_[i].begin() + count);
  }
  blocks_ = std::move(blocks);
  pointers_ = std::move(pointers);
  length_ = length;
}

std::size_t Cache::words(int length) const { return blocks_of(length) * block_words_; }

void Cache::copy_to(std::uint32_t* out, int length) const {
  for (std::size_t i = 0; i < blocks_of(length); ++i) {
    std::copy_n(blocks_[i]->data(), block_words_, out + i * block_words_);
  }
}

void Cache::assign(const std::uint32_t* words, int length) {
  truncate(0);
  reserve(length);
  for (std::size_t i = 0; i < blocks_of(length); ++i) {
    std::copy_n(words + i * block_words_, block_words_, blocks_[i]->data());
  }
  length_ = length;
}

}  // namespace edgevl

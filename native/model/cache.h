// Keys and values of one sequence.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/layout.h"
#include "model/buffer.h"

namespace edgevl {

/// Blocks of sequences that are gone, all of one size, kept for others: memory that the system has
/// to find and to clear page by page takes a long prompt several percent of its time.
class SpareBlocks {
 public:
  using Block = std::shared_ptr<Buffer<std::uint32_t>>;

  /// A block of zeros, from `spare` if that is there and has one; it goes back there in the end.
  /// Throws std::bad_alloc.
  static Block take(const std::shared_ptr<SpareBlocks>& spare, std::size_t words);

  /// What is kept now.
  std::size_t bytes() const {
    std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  void keep(Buffer<std::uint32_t> block);

  mutable std::mutex mutex_;
  std::vector<Buffer<std::uint32_t>> blocks_;
  std::size_t bytes_ = 0;
};

/// The key/value cache of one sequence, for all layers, in blocks of kCacheBlock positions. A block
/// is one allocation; there are as many as the sequence needs. Sequences that begin alike may share
/// blocks: who writes to one first makes a copy of it.
class Cache {
 public:
  Cache(int layers, int kv_heads, int head_dim, CacheFormat format = CacheFormat::kBf16,
        std::shared_ptr<SpareBlocks> spare = nullptr);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  /// Positions that hold a key and a value.
  int length() const { return length_; }

  /// Bytes of its blocks, those that it shares among them.
  std::size_t bytes() const { return blocks_.size() * block_words_ * sizeof(std::uint32_t); }

  /// Makes room for positions 0 .. positions - 1; those from length() on may then be written.
  /// Throws std::bad_alloc, and holds what it held.
  void reserve(int positions);

  /// Says that positions 0 .. length - 1, for which there is room, have been written.
  void set_length(int length) { length_ = length; }

  /// Forgets the positions from `length` on and frees their blocks. Throws std::invalid_argument
  /// unless 0 <= length <= length().
  void truncate(int length);

  /// Becomes the first `length` positions of `other`, whose shape and format are the same. Throws
  /// std::invalid_argument unless 0 <= length <= other.length(), and std::bad_alloc; unchanged
  /// then.
  void share(const Cache& other, int length);

  /// Words of the blocks that hold `length` positions.
  std::size_t words(int length) const;

  /// Copies the blocks of the first `length` positions, at most length(), to out [words(length)].
  void copy_to(std::uint32_t* out, int length) const;

  /// Becomes the `length` positions that `copy_to` gave for a cache of this shape and format.
  /// Throws std::bad_alloc, and is empty then.
  void assign(const std::uint32_t* words, int length);

  /// A pointer for each block to the keys, or values, of a head (see cache_words).
  std::uint32_t* const* keys(int layer, int head) const { return pointers(layer, head, 0); }
  std::uint32_t* const* values(int layer, int head) const { return pointers(layer, head, 1); }

 private:
  std::uint32_t* const* pointers(int layer, int head, int which) const {
    return pointers_[(static_cast<std::size_t>(layer) * kv_heads_ + head) * 2 + which].data();
  }

  using Block = SpareBlocks::Block;
  void point_at(std::size_t block);

  int kv_heads_;
  int length_ = 0;
  std::size_t head_words_;   ///< of a head's keys in a block
  std::size_t block_words_;  ///< of a block
  std::shared_ptr<SpareBlocks> spare_;
  std::vector<Block> blocks_;
  std::vector<std::vector<std::uint32_t*>> pointers_;  ///< [layers][kv_heads][keys, values][blocks]
};

}  // namespace edgevl

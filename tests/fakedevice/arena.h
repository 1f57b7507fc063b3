// Memory of the fake devices. A tensor's address lies in a range that is never mapped, so any access by the host faults. The contents lie at the
// same offset of a second range, the *shadow*, which only kernels and copies use.
#pragma once

#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace fake {

constexpr size_t ALIGNMENT = 512;
constexpr int POISON = 0xFF;  // of memory that was not written to, or was freed: NaN

inline size_t from_environment(const char* name, size_t otherwise) {
  const char* given = std::getenv(name);
  return given ? std::strtoull(given, nullptr, 10) : otherwise;
}

// One use of a run of a block: by the operation `number` of a stream.
struct Access {
  size_t start, stop;
  int64_t stream;
  uint64_t number;
  bool writes;
};

struct Block {
  size_t size = 0;
  std::vector<Access> accesses;
  std::vector<int64_t> recorded;  // streams whose work has to end before the block is used again (record_stream)
};

class Arena {
 public:
  explicit Arena(int index) : index_(index), size_(from_environment("FAKE_DEVICE_BYTES", size_t(1) << 29)) {
    base_ = reserve(PROT_NONE);
    shadow_ = reserve(PROT_READ | PROT_WRITE);
    free_[0] = size_;
  }

  size_t total() const { return size_; }
  size_t used() const { return used_; }
  size_t peak = 0;

  void* allocate(size_t bytes) {
    const size_t size = std::max(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& each) { return each.second >= size; });
    TORCH_CHECK_WITH(
        OutOfMemoryError, found != free_.end(), "fake device ", index_, " is out of memory: tried to allocate ", bytes, " bytes; ", size_ - used_,
        " of ", size_, " bytes are free");
    const auto [offset, room] = *found;
    free_.erase(found);
    if (room > size) free_[offset + size] = room - size;
    blocks_[offset].size = size;
    used_ += size;
    peak = std::max(peak, used_);
    std::memset(shadow_ + offset, POISON, size);
    return base_ + offset;
  }

  void release(void* address) {
    const size_t offset = static_cast<char*>(address) - base_;
    const size_t size = blocks_.at(offset).size;
    std::memset(shadow_ + offset, POISON, size);
    blocks_.erase(offset);
    used_ -= size;
    auto place = free_.emplace(offset, size).first;
    if (auto next = std::next(place); next != free_.end() && offset + size == next->first) {
      place->second += next->second;
      free_.erase(next);
    }
    if (place != free_.begin()) {
      auto before = std::prev(place);
      if (before->first + before->second == place->first) {
        before->second += place->second;
        free_.erase(place);
      }
    }
  }

  bool holds(const void* address) const { return address >= base_ && address < base_ + size_; }
  char* shadow(const void* address) const { return shadow_ + (static_cast<const char*>(address) - base_); }

  // Returns the block that an address lies in, and the address's offset in it.
  std::pair<Block*, size_t> block(const void* address) {
    const size_t offset = static_cast<const char*>(address) - base_;
    auto found = std::prev(blocks_.upper_bound(offset));
    return {&found->second, offset - found->first};
  }

 private:
  char* reserve(int protection) {
    void* found = mmap(nullptr, size_, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(found != MAP_FAILED, "fake device ", index_, " cannot reserve ", size_, " bytes of address space");
    return static_cast<char*>(found);
  }

  int index_;
  size_t size_, used_ = 0;
  char *base_, *shadow_;
  std::map<size_t, size_t> free_;  // offset -> size
  std::map<size_t, Block> blocks_;
};

}  // namespace fake

// A memory pool that outlives a call. A fresh block costs a page fault for every page, which for the tiles that a
// forward pass caches would take longer than the products they save.
#pragma once

#include <cstddef>

namespace cliperase {

// A block of the pool, returned to it by the destructor. Its contents are uninitialised.
class Workspace {
  public:
    explicit Workspace(std::size_t bytes);  // throws std::bad_alloc
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    char* data() const { return data_; }  // aligned to 64 bytes at least
    std::size_t bytes() const { return bytes_; }

  private:
    char* data_;
    std::size_t bytes_, capacity_;
};

std::size_t pooled_bytes();                               // unused memory in the pool
void limit_pooled_bytes(std::size_t limit);               // frees what exceeds it
constexpr std::size_t POOL_BYTES = std::size_t{2} << 30;  // the default limit

}  // namespace cliperase

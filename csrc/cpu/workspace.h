// Memory that outlives a call: what one gives back, the next takes. A fresh block costs a page fault for every page, which
// for the tiles that a forward pass keeps is dearer than the products they save.
#pragma once

#include <cstddef>

namespace cliperase {

// A block of the pool, given back when the object goes. Contents are whatever was there.
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

std::size_t pooled_bytes();                     // in the pool now, unused
void limit_pooled_bytes(std::size_t most);      // and frees what is over it
constexpr std::size_t POOL_BYTES = std::size_t{2} << 30;  // unless limited otherwise

}  // namespace cliperase

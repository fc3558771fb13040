#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cliperase {
namespace {

constexpr std::size_t PAGE = std::size_t{2} << 20;  // of 2 MiB, a huge page

struct Block {
    char* data;
    std::size_t capacity;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> blocks;
    std::size_t limit = POOL_BYTES;

    std::size_t unused() const {
        std::size_t total = 0;
        for (const Block& block : blocks) total += block.capacity;
        return total;
    }
    void shrink_to(std::size_t bytes) {
        while (unused() > bytes) {  // the oldest first
            std::free(blocks.front().data);
            blocks.erase(blocks.begin());
        }
    }
};

Pool& pool() {
    static Pool* const only = new Pool;  // never destroyed: tensors may outlive static objects
    return *only;
}

Block allocate(std::size_t bytes) {
    const std::size_t unit = bytes < PAGE ? std::size_t{64} : PAGE;
    if (bytes > static_cast<std::size_t>(-1) - PAGE) throw std::bad_alloc();
    const std::size_t capacity = (bytes + unit - 1) / unit * unit;
    void* data = nullptr;
    if (posix_memalign(&data, unit, capacity) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (unit == PAGE) madvise(data, capacity, MADV_HUGEPAGE);  // without it, pages are small
#endif
    return {static_cast<char*>(data), capacity};
}

Block take(std::size_t bytes) {
    Pool& from = pool();
    const std::lock_guard<std::mutex> lock(from.mutex);
    auto best = from.blocks.end();
    for (auto at = from.blocks.begin(); at != from.blocks.end(); ++at)
        if (at->capacity >= bytes && (best == from.blocks.end() || at->capacity < best->capacity)) best = at;
    if (best != from.blocks.end() && best->capacity / 2 <= bytes) {
        const Block found = *best;
        from.blocks.erase(best);
        return found;
    }
    try {
        return allocate(bytes);
    } catch (const std::bad_alloc&) {
        from.shrink_to(0);
        return allocate(bytes);
    }
}

}  // namespace

Workspace::Workspace(std::size_t bytes) : bytes_(bytes) {
    const Block block = take(bytes == 0 ? 1 : bytes);
    data_ = block.data;
    capacity_ = block.capacity;
}

Workspace::~Workspace() {
    Pool& to = pool();
    const std::lock_guard<std::mutex> lock(to.mutex);
    to.blocks.push_back({data_, capacity_});
    to.shrink_to(to.limit);
}

std::size_t pooled_bytes() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    return pool().unused();
}

void limit_pooled_bytes(std::size_t limit) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().limit = limit;
    pool().shrink_to(limit);
}

}  // namespace cliperase

// Refuses, before a launch, what would make a kernel read or write out of bounds.
#include <climits>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace cliperase::cuda {

void check(const Block& block) {
    if (block.rows < 1 || block.columns < 1) throw std::invalid_argument("rows and columns must be at least 1");
    if (block.student == nullptr || block.scalars == nullptr)
        throw std::invalid_argument("the address of the student's products or of the scalars is null");
    if ((block.row_groups == nullptr) != (block.column_groups == nullptr))
        throw std::invalid_argument("row_groups and column_groups must be given together");
    const Comparison& comparison = block.comparison;
    if (comparison.wanted ? block.teacher == nullptr : comparison.edits())
        throw std::invalid_argument("a comparison needs a teacher, and ids and levels need a comparison");
    for (const void* given : {static_cast<const void*>(comparison.column_ids),
                              static_cast<const void*>(comparison.row_levels),
                              static_cast<const void*>(comparison.column_levels)})
        if ((given == nullptr) == comparison.edits())
            throw std::invalid_argument("the ids and levels of rows and columns must be given together");
    if (comparison.edits() && block.masked())
        throw std::invalid_argument("a block with groups cannot be edited");
    if (block.leading % VECTOR != 0 || block.leading < block.columns)
        throw std::invalid_argument("leading must be a multiple of 4 and at least the number of columns");
    if (block.rows > INT64_MAX / 16 / block.leading)
        throw std::invalid_argument("rows times leading overflows 64 bits");
    for (const float* products : {block.student, block.teacher})
        if (reinterpret_cast<std::uintptr_t>(products) % (VECTOR * sizeof(float)) != 0)
            throw std::invalid_argument("the products must begin at a multiple of 16 bytes");
}

std::string device() {
#if defined(CLIPERASE_EMULATION)  // csrc/tests/emulation: the kernels run on the CPU
    return "cpu";
#else
    int number = 0;
    const cudaError_t error = cudaGetDevice(&number);
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA has no current device: ") + cudaGetErrorString(error));
    return "cuda:" + std::to_string(number);
#endif
}

unsigned grid_size(std::int64_t blocks) {
    if (blocks > INT_MAX) throw std::invalid_argument("the block is too large for one launch; use fewer rows");
    return static_cast<unsigned>(blocks);
}

void check_launch(cudaError_t error, const char* kernel) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA could not launch ") + kernel + ": " + cudaGetErrorString(error));
}

}  // namespace cliperase::cuda

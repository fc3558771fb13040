// The host side of a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "sweep.h"

namespace cliperase::cuda {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int VECTOR = 4;  // entries that are read and written at once

// The statistics that a kernel is compiled for, and whether it compares the cosines and edits the teacher's.
template <bool Plain, bool Masked, bool Teacher, bool Compared, bool Edited>
struct Form {
    static constexpr bool plain = Plain, masked = Masked, teacher = Teacher, compared = Compared, edited = Edited;
    static constexpr int students = int(Plain) + int(Masked);
    static constexpr int kinds = students + int(Teacher);
};

// Throws std::invalid_argument for what would make a kernel read or write out of bounds.
void check(const Block& block);
// The current device, by its name in torch; all memory must be there.
std::string device();
unsigned grid_size(std::int64_t blocks);
// Throws std::runtime_error.
void check_launch(cudaError_t error, const char* kernel);

template <typename Arguments>
void launch(void (*kernel)(Arguments), const char* name, dim3 grid, std::size_t shared, std::uintptr_t stream,
            const Arguments& arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    check_launch(cudaLaunchKernelEx(&config, kernel, arguments), name);
    check_launch(cudaGetLastError(), name);
}

// Calls `use` with the Form of a block.
template <typename Use>
void with_form(const Block& block, const Use& use) {
    if (block.comparison.edits()) {
        use(Form<true, false, true, true, true>());
    } else if (block.comparison.wanted) {
        if (block.masked())
            use(Form<true, true, true, true, false>());
        else
            use(Form<true, false, true, true, false>());
    } else if (block.teacher == nullptr) {
        if (block.masked())
            use(Form<false, true, false, false, false>());
        else
            use(Form<true, false, false, false, false>());
    } else if (block.masked()) {
        use(Form<true, true, true, false, false>());
    } else {
        use(Form<true, false, true, false, false>());
    }
}

}  // namespace cliperase::cuda

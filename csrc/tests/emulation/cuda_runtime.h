// Replaces CUDA's header where csrc/cuda is compiled for the CPU, for its tests; the source of the kernels is the same.
// A launch runs its blocks one after the other. The threads of a block are fibers that switch at __syncthreads.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#define CLIPERASE_EMULATION
#define __device__
#define __host__
#define __global__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }

inline dim3 blockIdx, threadIdx;  // of the running fiber

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "bad launch"; }
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulation {

constexpr std::size_t MAX_SHARED = 48 * 1024, WATCHED_FLOATS = MAX_SHARED / 4 + 256, STACK = 64 * 1024;
constexpr unsigned MAX_THREADS = 1024, MAX_GRID_YZ = 65535;
// Runs threads from the last to the first: a missing barrier gives a different result.
inline bool reversed = false;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = true;
};

struct Scheduler {
    std::vector<Fiber> fibers;
    ucontext_t main{};
    unsigned running = 0;
    void (*body)(const void*) = nullptr;
    const void* arguments = nullptr;
};
inline Scheduler scheduler;

inline void fiber_main() {
    Scheduler& s = scheduler;
    s.body(s.arguments);
    s.fibers[s.running].done = true;  // continues in main, its uc_link
}

inline void run_block(unsigned threads) {
    Scheduler& s = scheduler;
    if (s.fibers.size() < threads) s.fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = s.fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &s.main;
        makecontext(&fiber.context, fiber_main, 0);
        fiber.done = false;
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned turn = 0; turn < threads; ++turn) {
            const unsigned t = reversed ? threads - 1 - turn : turn;
            if (s.fibers[t].done) continue;
            any = true;
            s.running = t;
            threadIdx = dim3(t, 0, 0);
            swapcontext(&s.main, &s.fibers[t].context);
        }
    }
}

}  // namespace emulation

namespace cliperase::cuda {
namespace {
// The shared memory of a block, by the name that the kernels declare. Writes past its end are detected.
float4 shared_vectors[emulation::WATCHED_FLOATS / 4];
}  // namespace
}  // namespace cliperase::cuda

inline void __syncthreads() {
    emulation::Scheduler& s = emulation::scheduler;
    swapcontext(&s.fibers[s.running].context, &s.main);
}

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
    using namespace emulation;
    const dim3 grid = config->gridDim, block = config->blockDim;
    const std::size_t shared_bytes = config->dynamicSmemBytes;
    if (block.x > MAX_THREADS || shared_bytes > MAX_SHARED || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ ||
        grid.x == 0)
        return cudaErrorInvalidConfiguration;
    struct Call {
        void (*kernel)(Arguments);
        const Arguments* arguments;
    } const call{kernel, &arguments};
    scheduler.arguments = &call;
    scheduler.body = [](const void* of) {
        const Call& call = *static_cast<const Call*>(of);
        call.kernel(*call.arguments);
    };
    float* const shared = reinterpret_cast<float*>(cliperase::cuda::shared_vectors);
    const std::size_t size = WATCHED_FLOATS, used = shared_bytes / sizeof(float);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                for (std::size_t i = 0; i < size; ++i)
                    shared[i] = i < used ? std::numeric_limits<float>::quiet_NaN() : 12345.0F;
                run_block(block.x);
                for (std::size_t i = used; i < size; ++i)
                    if (shared[i] != 12345.0F)
                        throw std::logic_error("a kernel wrote past the end of its shared memory");
            }
    return cudaSuccess;
}

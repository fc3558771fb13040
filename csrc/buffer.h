// Memory as its owner describes it, and the check before every read and write of it, on CPUs and GPUs. Depends on
// neither torch nor Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace cliperase {

// Element types, by their names in torch.
enum class Dtype : int { float16, bfloat16, float32, float64, uint8, int32, int64 };

struct DtypeInfo {
    const char* name;
    std::size_t bytes;  // of an element
};

constexpr DtypeInfo DTYPES[] = {{"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8},
                                {"uint8", 1},   {"int32", 4},    {"int64", 8}};  // in the order of Dtype

constexpr const DtypeInfo& info(Dtype dtype) { return DTYPES[static_cast<int>(dtype)]; }

constexpr std::initializer_list<Dtype> FEATURE_DTYPES = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

constexpr int MAX_DIMENSIONS = 4;

struct Buffer {
    std::uintptr_t address;  // of the first element
    std::string dtype;       // its name in torch, known here or not
    int dimensions;
    std::array<std::int64_t, MAX_DIMENSIONS> sizes, strides;  // in elements
    std::string device;                                       // "cpu", "cuda:0"
};

// The dtype of a buffer; std::invalid_argument where it is not in DTYPES.
Dtype dtype_of(const Buffer& buffer);

enum class Layout {
    dense,  // contiguous
    rows,   // two dimensions; rows are contiguous, but may be further apart
    any,    // any strides of 0 or more; for inputs only
};

struct Size {
    std::int64_t value;
    bool exact;
    constexpr Size(std::int64_t exactly) : value(exactly), exact(true) {}
    constexpr Size(std::int64_t least, bool is_exact) : value(least), exact(is_exact) {}
};

constexpr Size at_least(std::int64_t value) { return {value, false}; }

// What a call is about to read or write.
struct Expected {
    const char* name;
    std::initializer_list<Dtype> dtypes;
    std::initializer_list<Size> sizes;
    Layout layout;
    const std::string& device;
    std::size_t alignment = 0;  // of the first element and of every row, in bytes; 0: that of the element
};

// Returns the address. Throws std::invalid_argument, with what was expected and what was given, before any read or
// write.
void* checked(const Buffer& buffer, const Expected& expected);

}  // namespace cliperase

// Memory as its owner describes it, and the one check that stands before every read and write of it: on the CPU and on GPUs
// alike. Nothing here knows of torch or of Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace cliperase {

constexpr int MOST_DIMENSIONS = 4;

struct Buffer {
    std::uintptr_t address;  // of the first element
    std::string dtype;       // as torch calls it: "float32"
    int dimensions;
    std::array<std::int64_t, MOST_DIMENSIONS> sizes, strides;  // in elements
    std::string device;                                        // "cpu", "cuda:0"
};

enum class Layout {
    dense,  // no gaps, the last dimension's elements side by side
    rows,   // two dimensions; a row is dense, and rows may lie further apart
    any,    // strides of 0 and more: for what is only read
};

struct Size {
    std::int64_t value;
    bool exact;
    constexpr Size(std::int64_t exactly) : value(exactly), exact(true) {}
    constexpr Size(std::int64_t least, bool is_exact) : value(least), exact(is_exact) {}
};

constexpr Size at_least(std::int64_t value) { return {value, false}; }

// What a call is going to read or write.
struct Expected {
    const char* name;
    std::initializer_list<const char*> dtypes;
    std::initializer_list<Size> sizes;
    Layout layout;
    const std::string& device;
    std::size_t alignment = 0;  // of the first element and of every row, in bytes; 0: that of the element
};

// Bytes of an element; 0: not a type that is known here.
std::size_t element_bytes(const std::string& dtype);

// The address. std::invalid_argument that says what was expected and what came, before anything is read or written.
void* checked(const Buffer& buffer, const Expected& expected);

}  // namespace cliperase

// The Python class Buffer, for the extension and for the emulated kernels of the tests.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "buffer.h"

namespace cliperase {

// Keeps the owner of the memory alive.
struct OwnedBuffer : Buffer {
    pybind11::object owner;
};

inline OwnedBuffer make_buffer(std::uintptr_t address, std::string dtype, const pybind11::tuple& sizes,
                               const pybind11::tuple& strides, std::string device, pybind11::object owner) {
    if (sizes.size() != strides.size() || sizes.size() > MAX_DIMENSIONS)
        throw std::invalid_argument("a buffer must have as many strides as sizes, and at most " +
                                    std::to_string(MAX_DIMENSIONS));
    OwnedBuffer out{{address, std::move(dtype), static_cast<int>(sizes.size()), {}, {}, std::move(device)},
                    std::move(owner)};
    for (std::size_t at = 0; at < sizes.size(); ++at) {
        out.sizes[at] = sizes[at].cast<std::int64_t>(), out.strides[at] = strides[at].cast<std::int64_t>();
        if (out.sizes[at] < 0) throw std::invalid_argument("a buffer has a size of " + std::to_string(out.sizes[at]));
    }
    return out;
}

inline void bind_buffer(pybind11::module_& module) {
    namespace py = pybind11;
    // Local to the module, as the emulated kernels of the tests define the same type.
    py::class_<OwnedBuffer>(module, "Buffer", "Memory: address, dtype, sizes, strides in elements, and device.",
                            py::module_local())
        .def(py::init(&make_buffer), py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
             py::arg("device"), py::arg("owner") = py::none());
}

}  // namespace cliperase

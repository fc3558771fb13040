// csrc/cuda, compiled for the CPU with csrc/tests/emulation in place of CUDA's headers, as a Python module for the
// tests.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "bind_buffer.h"

void bind_cuda(pybind11::module_& module);

namespace py = pybind11;

PYBIND11_MODULE(emulated_cuda, module) {
    cliperase::bind_buffer(module);
    bind_cuda(module);
    py::module_ cuda = module.attr("cuda");
    cuda.def("reverse_threads", [](bool reversed) { emulation::reversed = reversed; });
}

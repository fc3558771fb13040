// The extension module cliperase_fast._C.
#include <pybind11/pybind11.h>

#include "bind_buffer.h"

namespace py = pybind11;

void bind_cpu(py::module_& parent);  // cpu/bindings.cpp
#if defined(CLIPERASE_CUDA)
void bind_cuda(py::module_& parent);  // cuda/bindings.cpp
#endif

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled parts of cliperase_fast. Takes buffers; uses nothing of torch's C++ interface.";
    cliperase::bind_buffer(module);
    bind_cpu(module);
#if defined(CLIPERASE_CUDA)
    bind_cuda(module);
#endif
    // Increment it whenever an argument changes its name or meaning, here and in
    // cliperase_fast/ops/native/extension.py.
    module.attr("INTERFACE") = 9;
    py::dict info;
    info["compiler"] = CLIPERASE_COMPILER;
    info["openmp"] = bool(CLIPERASE_OPENMP);
    info["cuda"] = CLIPERASE_CUDA_VERSION;
    info["cuda_architectures"] = CLIPERASE_CUDA_ARCHITECTURES;
    module.attr("build_info") = info;
}

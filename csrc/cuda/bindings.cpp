// What Python sees of the CUDA kernels: cliperase_fast._C.cuda. Device addresses and the stream's handle come as integers.
#include <pybind11/pybind11.h>

#include "sweep.h"

namespace py = pybind11;

namespace {

using namespace cliperase::cuda;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Block make_block(std::int64_t rows, std::int64_t columns, std::int64_t leading, std::int64_t diagonal, Address student,
                 Address teacher, Address scalars, Address row_groups, Address column_groups) {
    return {pointer<const float>(student),          pointer<const float>(teacher), rows, columns, leading, diagonal,
            pointer<const float>(scalars),          pointer<const std::int64_t>(row_groups),
            pointer<const std::int64_t>(column_groups)};
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ module = parent.def_submodule("cuda", "The parts of the similarity sweep between its matrix products.");

    py::enum_<Format>(module, "Format")
        .value("float32", Format::float32)
        .value("bfloat16", Format::bfloat16)
        .value("float16", Format::float16);

    py::class_<Block>(module, "Block", "Products [rows, columns] of S and S°; see csrc/cuda/sweep.h.")
        .def(py::init(&make_block), py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("leading"),
             py::arg("diagonal"), py::arg("student"), py::arg("teacher") = 0, py::arg("scalars"), py::arg("row_groups") = 0,
             py::arg("column_groups") = 0);

    module.def("forward_workspace", &forward_workspace, py::arg("block"), "How many floats `forward` works with.");

    module.def(
        "forward",
        [](const Block& block, Address row_sums, std::int64_t row_stride, bool row_fresh, Address column_sums,
           std::int64_t column_stride, bool column_fresh, Address diagonal, Address teacher_diagonal, Address workspace,
           std::int64_t workspace_size, Address stream) {
            forward(block,
                    {{pointer<float>(row_sums), row_stride, row_fresh},
                     {pointer<float>(column_sums), column_stride, column_fresh},
                     pointer<float>(diagonal),
                     pointer<float>(teacher_diagonal),
                     pointer<float>(workspace),
                     workspace_size},
                    stream);
        },
        py::arg("block"), py::kw_only(), py::arg("row_sums"), py::arg("row_stride"), py::arg("row_fresh"),
        py::arg("column_sums"), py::arg("column_stride"), py::arg("column_fresh"), py::arg("diagonal"),
        py::arg("teacher_diagonal") = 0, py::arg("workspace"), py::arg("workspace_size"), py::arg("stream"));

    module.def(
        "backward",
        [](const Block& block, Address row_terms, std::int64_t row_stride, Address column_terms, std::int64_t column_stride,
           Address diagonal, Address gradient, std::int64_t gradient_leading, Format format, Address stream) {
            backward(block,
                     {pointer<const float>(row_terms), pointer<const float>(column_terms), row_stride, column_stride,
                      pointer<const float>(diagonal), pointer<void>(gradient), gradient_leading, format},
                     stream);
        },
        py::arg("block"), py::kw_only(), py::arg("row_terms"), py::arg("row_stride"), py::arg("column_terms"),
        py::arg("column_stride"), py::arg("diagonal"), py::arg("gradient"), py::arg("gradient_leading"), py::arg("format"),
        py::arg("stream"));
}

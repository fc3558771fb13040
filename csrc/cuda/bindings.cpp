// Python bindings of the CUDA kernels: cliperase_fast._C.cuda. Tensors are passed as buffers (csrc/buffer.h), each
// checked before it is read or written, and the stream's handle as an integer.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_buffer.h"
#include "launch.h"

namespace py = pybind11;

namespace {

using namespace cliperase::cuda;
using cliperase::at_least;
using cliperase::checked;
using cliperase::Dtype;
using cliperase::dtype_of;
using cliperase::FEATURE_DTYPES;
using cliperase::info;
using cliperase::Layout;
using cliperase::OwnedBuffer;
using cliperase::Size;
using Sizes = std::initializer_list<Size>;

// A block that keeps the owners of its memory alive.
struct OwningBlock : Block {
    std::vector<py::object> owners;
};

constexpr std::size_t VECTOR_BYTES = VECTOR * sizeof(float);

// Kernels read and write whole vectors of a row.
std::int64_t whole_vectors(std::int64_t columns) { return (columns + VECTOR - 1) / VECTOR * VECTOR; }

template <typename T>
T* dense(const char* name, Dtype dtype, const OwnedBuffer& buffer, Sizes sizes) {
    return static_cast<T*>(checked(buffer, {name, {dtype}, sizes, Layout::dense, device()}));
}

float* contiguous_rows(const char* name, const OwnedBuffer& buffer, std::int64_t rows, std::int64_t columns) {
    return static_cast<float*>(checked(buffer, {name, {Dtype::float32}, {rows, columns}, Layout::rows, device()}));
}

const float* products(const char* name, const OwnedBuffer& buffer, std::int64_t rows, std::int64_t columns) {
    const Sizes sizes{rows, at_least(whole_vectors(columns))};
    return static_cast<const float*>(
        checked(buffer, {name, {Dtype::float32}, sizes, Layout::rows, device(), VECTOR_BYTES}));
}

// From row to row, in elements.
std::int64_t leading(const OwnedBuffer& matrix) {
    return matrix.sizes[0] > 1 ? matrix.strides[0] : whole_vectors(matrix.sizes[1]);
}

template <typename T>
const T* dense_or_null(const char* name, Dtype dtype, const OwnedBuffer* buffer, std::int64_t size) {
    return buffer == nullptr ? nullptr : dense<const T>(name, dtype, *buffer, {size});
}

OwningBlock make_block(std::int64_t columns, std::int64_t pair_offset, const OwnedBuffer& student,
                       const OwnedBuffer* teacher, const OwnedBuffer& scalars, const OwnedBuffer* row_groups,
                       const OwnedBuffer* column_groups, bool compares, const OwnedBuffer* row_ids,
                       const OwnedBuffer* column_ids, const OwnedBuffer* row_levels,
                       const OwnedBuffer* column_levels) {
    if (columns < 1 || columns > INT64_MAX / 64)
        throw std::invalid_argument("columns = " + std::to_string(columns) + " must be at least 1 and fit 64 bits");
    if ((row_groups == nullptr) != (column_groups == nullptr))
        throw std::invalid_argument("row_groups and column_groups must be given together");
    OwningBlock block{};
    block.rows = student.dimensions == 2 ? student.sizes[0] : 0, block.columns = columns,
    block.pair_offset = pair_offset;
    block.student = products("student", student, block.rows, columns), block.leading = leading(student);
    if (teacher != nullptr) {
        block.teacher = products("teacher", *teacher, block.rows, columns);
        if (leading(*teacher) != block.leading)
            throw std::invalid_argument("student and teacher must have the same stride from row to row");
    }
    block.scalars = dense<const float>("scalars", Dtype::float32, scalars, {3});
    block.row_groups = dense_or_null<std::int64_t>("row_groups", Dtype::int64, row_groups, block.rows);
    block.column_groups = dense_or_null<std::int64_t>("column_groups", Dtype::int64, column_groups, columns);
    block.comparison = {compares, dense_or_null<std::int64_t>("row_ids", Dtype::int64, row_ids, block.rows),
                        dense_or_null<std::int64_t>("column_ids", Dtype::int64, column_ids, columns),
                        dense_or_null<float>("row_levels", Dtype::float32, row_levels, block.rows),
                        dense_or_null<float>("column_levels", Dtype::float32, column_levels, columns)};
    check(block);
    for (const OwnedBuffer* buffer : {&student, teacher, &scalars, row_groups, column_groups, row_ids, column_ids,
                                      row_levels, column_levels})
        if (buffer != nullptr) block.owners.push_back(buffer->owner);
    return block;
}

void run_forward(const OwningBlock& block, const OwnedBuffer& row_stats, bool row_fresh,
                 const OwnedBuffer& column_stats, bool column_fresh, const OwnedBuffer& diagonal,
                 const OwnedBuffer* teacher_diagonal, const OwnedBuffer& workspace, const OwnedBuffer* squares,
                 std::uintptr_t stream) {
    if (block.teacher != nullptr && teacher_diagonal == nullptr)
        throw std::invalid_argument("teacher_diagonal is needed with a teacher");
    if (block.comparison.wanted && squares == nullptr)
        throw std::invalid_argument("squares is needed with a comparison");
    const std::int64_t stats = stat_count(block);
    const Stats rows{contiguous_rows("row_stats", row_stats, stats, block.rows), row_stats.strides[0], row_fresh};
    const Stats columns{contiguous_rows("column_stats", column_stats, stats, block.columns), column_stats.strides[0],
                        column_fresh};
    float* const to_diagonal = dense<float>("diagonal", Dtype::float32, diagonal, {block.rows});
    float* const to_teacher_diagonal =
        teacher_diagonal == nullptr ? nullptr
                                    : dense<float>("teacher_diagonal", Dtype::float32, *teacher_diagonal, {block.rows});
    float* const work = dense<float>("workspace", Dtype::float32, workspace, {at_least(forward_workspace(block))});
    float* const to_squares =
        squares == nullptr ? nullptr
                           : dense<float>("squares", Dtype::float32, *squares, {2, forward_programs(block)});
    forward(block, {rows, columns, to_diagonal, to_teacher_diagonal, work, workspace.sizes[0], to_squares}, stream);
}

void run_backward(const OwningBlock& block, const OwnedBuffer& row_terms, const OwnedBuffer& column_terms,
                  const OwnedBuffer& diagonal, const OwnedBuffer& gradient, const OwnedBuffer* pull,
                  const OwnedBuffer* dots, std::uintptr_t stream) {
    if (block.comparison.wanted && (pull == nullptr || dots == nullptr))
        throw std::invalid_argument("pull and dots are needed with a comparison");
    const std::int64_t terms = 2 * kinds(block);
    const std::size_t vector_bytes = gradient.dtype == info(Dtype::float32).name ? VECTOR_BYTES : VECTOR_BYTES / 2;
    Backward out{};
    out.row_terms = contiguous_rows("row_terms", row_terms, terms, block.rows), out.row_stride = row_terms.strides[0];
    out.column_terms = contiguous_rows("column_terms", column_terms, terms, block.columns),
    out.column_stride = column_terms.strides[0];
    out.diagonal = dense<const float>("diagonal", Dtype::float32, diagonal, {block.rows});
    out.gradient = checked(gradient, {"gradient",
                                      FEATURE_DTYPES,
                                      {block.rows, at_least(whole_vectors(block.columns))},
                                      Layout::rows,
                                      device(),
                                      vector_bytes});
    out.gradient_leading = leading(gradient), out.dtype = dtype_of(gradient);
    out.pull = dense_or_null<float>("pull", Dtype::float32, pull, 2);
    if (dots != nullptr) out.dots = dense<float>("dots", Dtype::float32, *dots, {backward_programs(block)});
    backward(block, out, stream);
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ module = parent.def_submodule("cuda", "The similarity sweep without its matrix products.");
    module.attr("Buffer") = parent.attr("Buffer");
    // Increment it whenever an argument is added or changes its name or meaning, here and in
    // cliperase_fast/ops/native/extension.py.
    module.attr("INTERFACE") = 1;

    // Local to the module, as the emulated kernels of the tests define the same type.
    py::class_<OwningBlock>(module, "Block", "Products [rows, columns] of S and S°; see csrc/cuda/sweep.h.",
                            py::module_local())
        .def(py::init(&make_block), py::kw_only(), py::arg("columns"), py::arg("pair_offset"), py::arg("student"),
             py::arg("teacher") = py::none(), py::arg("scalars"), py::arg("row_groups") = py::none(),
             py::arg("column_groups") = py::none(), py::arg("compares") = false, py::arg("row_ids") = py::none(),
             py::arg("column_ids") = py::none(), py::arg("row_levels") = py::none(),
             py::arg("column_levels") = py::none());

    module.def(
        "forward_workspace", [](const OwningBlock& block) { return forward_workspace(block); }, py::arg("block"),
        "The number of floats that `forward` needs as workspace.");
    module.def(
        "forward_programs", [](const OwningBlock& block) { return forward_programs(block); }, py::arg("block"),
        "The length of the squares that `forward` writes.");
    module.def(
        "backward_programs", [](const OwningBlock& block) { return backward_programs(block); }, py::arg("block"),
        "The length of the dots that `backward` writes.");
    module.def("forward", &run_forward, py::arg("block"), py::kw_only(), py::arg("row_stats"), py::arg("row_fresh"),
               py::arg("column_stats"), py::arg("column_fresh"), py::arg("diagonal"),
               py::arg("teacher_diagonal") = py::none(), py::arg("workspace"), py::arg("squares") = py::none(),
               py::arg("stream"));
    module.def("backward", &run_backward, py::arg("block"), py::kw_only(), py::arg("row_terms"),
               py::arg("column_terms"), py::arg("diagonal"), py::arg("gradient"), py::arg("pull") = py::none(),
               py::arg("dots") = py::none(), py::arg("stream"));
}

// Python bindings of the CPU sweep: cliperase_fast._C.cpu. Tensors are passed as buffers (csrc/buffer.h), each checked
// before it is read or written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_buffer.h"
#include "cpu/calibrated.h"
#include "cpu/softmax_stats.h"
#include "cpu/sweep.h"
#include "cpu/workspace.h"

namespace py = pybind11;

namespace {

using cliperase::at_least;
using cliperase::checked;
using cliperase::Dtype;
using cliperase::dtype_of;
using cliperase::FEATURE_DTYPES;
using cliperase::Forward;
using cliperase::Gradient;
using cliperase::Layout;
using cliperase::Matrix;
using cliperase::OwnedBuffer;
using cliperase::SimilarityInputs;
using cliperase::Size;
using Sizes = std::initializer_list<Size>;
using Name = std::optional<std::string>;

const std::string CPU = "cpu";

// SimilarityInputs that keep the owners of their memory alive.
struct OwningInputs : SimilarityInputs {
    std::vector<py::object> owners;
};

template <typename T>
T* dense(const char* name, Dtype dtype, const OwnedBuffer& buffer, Sizes sizes) {
    return static_cast<T*>(checked(buffer, {name, {dtype}, sizes, Layout::dense, CPU}));
}

float* floats(const char* name, const OwnedBuffer& buffer, Sizes sizes) {
    return dense<float>(name, Dtype::float32, buffer, sizes);
}

// The same; null for None.
float* floats(const char* name, const OwnedBuffer* buffer, Sizes sizes) {
    return buffer == nullptr ? nullptr : floats(name, *buffer, sizes);
}

const std::int32_t* ids(const char* name, const OwnedBuffer& buffer, Size size) {
    return dense<const std::int32_t>(name, Dtype::int32, buffer, {size});
}

Matrix features(const char* name, const OwnedBuffer& buffer, Sizes sizes) {
    const void* const data = checked(buffer, {name, FEATURE_DTYPES, sizes, Layout::any, CPU});
    return {data, buffer.strides[0], buffer.strides[1], dtype_of(buffer)};
}

OwningInputs make_inputs(const OwnedBuffer& image, const OwnedBuffer& text, std::int64_t pair_offset, double scale,
                         const OwnedBuffer* teacher_image, const OwnedBuffer* teacher_text, double teacher_scale,
                         const OwnedBuffer* row_groups, const OwnedBuffer* column_groups, int threads, bool compares,
                         const OwnedBuffer* row_ids, const OwnedBuffer* column_ids, const OwnedBuffer* row_levels,
                         const OwnedBuffer* column_levels,
                         const std::optional<std::pair<std::int64_t, std::int64_t>>& forget) {
    OwningInputs in{};
    in.image = features("image", image, {at_least(1), at_least(1)});
    in.rows = image.sizes[0], in.width = image.sizes[1];
    in.text = features("text", text, {at_least(1), in.width});
    in.columns = text.sizes[0], in.pair_offset = pair_offset, in.scale = static_cast<float>(scale),
    in.threads = threads;
    if ((teacher_image == nullptr) != (teacher_text == nullptr))
        throw std::invalid_argument("teacher_image and teacher_text must be given together");
    if ((in.has_teacher = teacher_image != nullptr)) {
        in.teacher_image = features("teacher_image", *teacher_image, {in.rows, at_least(1)});
        in.teacher_width = teacher_image->sizes[1], in.teacher_scale = static_cast<float>(teacher_scale);
        in.teacher_text = features("teacher_text", *teacher_text, {in.columns, in.teacher_width});
    }
    if ((row_groups == nullptr) != (column_groups == nullptr))
        throw std::invalid_argument("row_groups and column_groups must be given together");
    if (row_groups != nullptr) {
        in.row_groups = ids("row_groups", *row_groups, in.rows);
        in.column_groups = ids("column_groups", *column_groups, in.columns);
    }
    cliperase::Comparison& comparison = in.comparison;
    comparison.wanted = compares;
    if (row_ids != nullptr) comparison.row_ids = ids("row_ids", *row_ids, in.rows);
    if (column_ids != nullptr) comparison.column_ids = ids("column_ids", *column_ids, in.columns);
    comparison.row_levels = floats("row_levels", row_levels, {in.rows});
    comparison.column_levels = floats("column_levels", column_levels, {in.columns});
    comparison.joint = forget.has_value();
    if (forget) std::tie(comparison.forget_begin, comparison.forget_end) = *forget;
    cliperase::check(in);
    for (const OwnedBuffer* buffer : {&image, &text, teacher_image, teacher_text, row_groups, column_groups, row_ids,
                                      column_ids, row_levels, column_levels})
        if (buffer != nullptr) in.owners.push_back(buffer->owner);
    return in;
}

struct Cache {
    void* data = nullptr;
    std::int64_t rows = 0;  // the first rows, whose tiles are cached
};

Cache checked_cache(const SimilarityInputs& in, const OwnedBuffer* buffer) {
    if (buffer == nullptr) return {};
    const std::int64_t row_bytes = cliperase::cache_row_bytes(in);
    void* const data =
        checked(*buffer, {"cache", {Dtype::uint8}, {at_least(row_bytes)}, Layout::dense, CPU, sizeof(float)});
    const cliperase::Tiling tiles = cliperase::row_tiles(in);
    const std::int64_t bytes = buffer->sizes[0], limit = tiles.tiles * row_bytes;
    if (bytes % row_bytes != 0 || bytes > limit)
        throw std::invalid_argument("cache has " + std::to_string(bytes) + " bytes; it must have a multiple of " +
                                    std::to_string(row_bytes) + ", at most " + std::to_string(limit));
    return {data, tiles.start(bytes / row_bytes)};
}

const cliperase::IsaKernels& kernels_named(const Name& name) {
    const cliperase::IsaKernels* const found = cliperase::choose_kernels(name ? name->c_str() : nullptr);
    if (found == nullptr)
        throw std::invalid_argument("instruction set " + *name +
                                    " is not available here; use amx, avx512_bf16, avx512, avx2 or portable");
    return *found;
}

const cliperase::IsaKernels& kernels_for(const SimilarityInputs& in, const Name& name) {
    return kernels_named(name).taking(in);
}

void run_forward(const SimilarityInputs& in, const Forward& out, const cliperase::IsaKernels& chosen) {
    cliperase::check(in, out);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.forward_scratch(in));
    chosen.forward(in, out, scratch.data());
}

// The shift, and the squares of a comparison.
std::tuple<float, double, double> forward(const OwningInputs& in, const OwnedBuffer* diagonal,
                                          const OwnedBuffer* teacher_diagonal, const OwnedBuffer& row_stats,
                                          const OwnedBuffer& column_stats, const OwnedBuffer* cache_buffer,
                                          const Name& isa) {
    const Cache cache = checked_cache(in, cache_buffer);
    const std::int64_t stats = cliperase::stat_count(in);
    float shift = 0;
    double squares[2] = {0, 0};
    const Forward out{floats("diagonal", diagonal, {in.rows}),
                      floats("teacher_diagonal", teacher_diagonal, {in.rows}),
                      floats("row_stats", row_stats, {stats, in.rows}),
                      floats("column_stats", column_stats, {stats, in.columns}),
                      &shift,
                      cache.data,
                      cache.rows,
                      squares};
    run_forward(in, out, kernels_for(in, isa));
    return {shift, squares[0], squares[1]};
}

void losses(const OwningInputs& in, bool want_retention, const OwnedBuffer& retention, const OwnedBuffer& consistency,
            const OwnedBuffer& saved_stats, const OwnedBuffer* cache_buffer, const Name& isa) {
    if (in.rows != in.columns || in.pair_offset != 0)
        throw std::invalid_argument("losses takes a whole batch: as many rows as columns, and pair_offset = 0");
    if (in.comparison.wanted) throw std::invalid_argument("losses takes no comparison");
    const Cache cache = checked_cache(in, cache_buffer);
    const std::int64_t n = in.rows, size = cliperase::stat_count(in) * n;
    float* const to_retention = floats("retention", retention, {});
    float* const to_consistency = floats("consistency", consistency, {});
    float* const to_saved_stats = floats("saved_stats", saved_stats, {cliperase::SAVED_STATS, 2 * n});
    const cliperase::Workspace memory(static_cast<std::size_t>(2 * size + 2 * n) * sizeof(float));
    float *rows = reinterpret_cast<float*>(memory.data()), shift = 0;
    const Forward found{rows + 2 * size, rows + 2 * size + n, rows, rows + size, &shift, cache.data, cache.rows};
    run_forward(in, found, kernels_for(in, isa));
    const cliperase::Losses result = cliperase::compute_losses(in, want_retention, found, to_saved_stats);
    const double pairs = static_cast<double>(n);
    *to_retention = static_cast<float>(0.5 * result.retention / pairs);
    *to_consistency = static_cast<float>(result.consistency / pairs);
}

Gradient gradient(const char* name, const OwnedBuffer* buffer, std::int64_t rows, std::int64_t width) {
    if (buffer == nullptr) return {};
    return {checked(*buffer, {name, FEATURE_DTYPES, {rows, width}, Layout::dense, CPU}), dtype_of(*buffer)};
}

double backward(const OwningInputs& in, const OwnedBuffer& saved_stats, bool want_retention, double weight_retention,
                double weight_consistency, const OwnedBuffer* cache_buffer, const OwnedBuffer* grad_image,
                const OwnedBuffer* grad_text, bool need_scale, const Name& isa) {
    const Cache cache = checked_cache(in, cache_buffer);
    double grad_scale = 0;
    cliperase::Backward b{};
    b.cache = cache.data, b.cached_rows = cache.rows;
    b.grad_image = gradient("grad_image", grad_image, in.rows, in.width);
    b.grad_text = gradient("grad_text", grad_text, in.columns, in.width);
    b.grad_scale = need_scale ? &grad_scale : nullptr;
    const float* const from_saved_stats =
        floats("saved_stats", saved_stats, {cliperase::SAVED_STATS, in.rows + in.columns});
    const cliperase::IsaKernels& chosen = kernels_for(in, isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace terms(static_cast<std::size_t>(cliperase::terms_size(in)) * sizeof(float));
    cliperase::gradient_terms(in, from_saved_stats, want_retention, weight_retention, weight_consistency,
                              reinterpret_cast<float*>(terms.data()), b);
    cliperase::check(in, b);
    const cliperase::Workspace scratch(chosen.backward_scratch(in, b));
    chosen.backward(in, b, scratch.data());
    return grad_scale;
}

cliperase::Softmax softmax(const float* terms, std::int64_t rows, std::int64_t columns) {
    const float* const of_columns = terms + 2 * rows;
    return {terms, of_columns, terms + rows, of_columns + columns};
}

// The gradients of a block with a comparison, from the terms of dS: of the student, the teacher and, where there are
// groups, the masked student, each with anchors and factors of rows, then of columns.
double compared_backward(const OwningInputs& in, const OwnedBuffer& terms, const OwnedBuffer* diagonal,
                         double pull_forget, double pull_anchor, const OwnedBuffer* cache_buffer,
                         const OwnedBuffer* grad_image, const OwnedBuffer* grad_text, const Name& isa) {
    if (!in.comparison.wanted) throw std::invalid_argument("compared_backward needs inputs with a comparison");
    if (in.comparison.joint) throw std::invalid_argument("compared_backward takes no joint batch");
    const Cache cache = checked_cache(in, cache_buffer);
    const std::int64_t size = 2 * (in.rows + in.columns);
    const float* const from = floats("terms", terms, {2 + in.has_masked(), size});
    double similarity_dot = 0;
    cliperase::Backward b{};
    b.cache = cache.data, b.cached_rows = cache.rows;
    b.student = softmax(from, in.rows, in.columns);
    b.teacher = softmax(from + size, in.rows, in.columns);
    if (in.has_masked()) b.masked = softmax(from + 2 * size, in.rows, in.columns);
    b.diagonal = floats("diagonal", diagonal, {in.rows});
    b.grad_image = gradient("grad_image", grad_image, in.rows, in.width);
    b.grad_text = gradient("grad_text", grad_text, in.columns, in.width);
    b.pull_forget = static_cast<float>(pull_forget), b.pull_anchor = static_cast<float>(pull_anchor);
    b.similarity_dot = &similarity_dot;
    cliperase::check(in, b);
    const cliperase::IsaKernels& chosen = kernels_for(in, isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.backward_scratch(in, b));
    chosen.backward(in, b, scratch.data());
    return similarity_dot;
}

void check_joint(const SimilarityInputs& in) {
    if (!in.comparison.joint) throw std::invalid_argument("the calibrated loss needs inputs of a joint batch");
}

void calibrated(const OwningInputs& in, const OwnedBuffer& terms, const OwnedBuffer& factors, const OwnedBuffer& saved,
                const OwnedBuffer* cache_buffer, const Name& isa) {
    check_joint(in);
    const Cache cache = checked_cache(in, cache_buffer);
    const std::int64_t n = in.rows, size = cliperase::stat_count(in) * n;
    float* const to_terms = floats("terms", terms, {cliperase::CALIBRATED_TERMS});
    float* const to_factors = floats("factors", factors, {cliperase::CALIBRATED_TERMS});
    float* const to_saved = floats("saved", saved, {cliperase::SAVED_STATS + 1, 2 * n});
    const cliperase::Workspace memory(static_cast<std::size_t>(2 * size + 2 * n) * sizeof(float));
    float *rows = reinterpret_cast<float*>(memory.data()), shift = 0;
    double squares[2] = {0, 0};
    const Forward found{
        rows + 2 * size, rows + 2 * size + n, rows, rows + size, &shift, cache.data, cache.rows, squares};
    run_forward(in, found, kernels_for(in, isa));
    cliperase::calibrated_terms(in, found, to_terms, to_factors, to_saved);
}

double calibrated_backward(const OwningInputs& in, const OwnedBuffer& saved, const OwnedBuffer& weights,
                           const OwnedBuffer* cache_buffer, const OwnedBuffer* grad_image, const OwnedBuffer* grad_text,
                           const Name& isa) {
    check_joint(in);
    const Cache cache = checked_cache(in, cache_buffer);
    const float* const from = floats("saved", saved, {cliperase::SAVED_STATS + 1, 2 * in.rows});
    const float* const of_terms = floats("weights", weights, {cliperase::CALIBRATED_TERMS});
    double each[cliperase::CALIBRATED_TERMS], similarity_dot = 0;
    std::copy(of_terms, of_terms + cliperase::CALIBRATED_TERMS, each);
    cliperase::Backward b{};
    b.cache = cache.data, b.cached_rows = cache.rows;
    b.grad_image = gradient("grad_image", grad_image, in.rows, in.width);
    b.grad_text = gradient("grad_text", grad_text, in.columns, in.width);
    b.similarity_dot = &similarity_dot;
    const cliperase::IsaKernels& chosen = kernels_for(in, isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace terms(static_cast<std::size_t>(cliperase::terms_size(in)) * sizeof(float));
    const double of_pairs =
        cliperase::calibrated_gradient_terms(in, from, each, reinterpret_cast<float*>(terms.data()), b);
    cliperase::check(in, b);
    const cliperase::Workspace scratch(chosen.backward_scratch(in, b));
    chosen.backward(in, b, scratch.data());
    return (of_pairs + similarity_dot) / static_cast<double>(in.scale);
}

std::tuple<double, double, double> sigmoid(const OwningInputs& in, double bias, const OwnedBuffer* grad_image,
                                           const OwnedBuffer* grad_text, bool need_scale, bool need_bias,
                                           const Name& isa) {
    double loss = 0, grad_scale = 0, grad_bias = 0;
    const cliperase::Sigmoid s{static_cast<float>(bias),
                               &loss,
                               gradient("grad_image", grad_image, in.rows, in.width),
                               gradient("grad_text", grad_text, in.columns, in.width),
                               need_scale ? &grad_scale : nullptr,
                               need_bias ? &grad_bias : nullptr};
    cliperase::check(in, s);
    const cliperase::IsaKernels& chosen = kernels_for(in, isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.sigmoid_scratch(in, s));
    chosen.sigmoid(in, s, scratch.data());
    return {loss, grad_scale, grad_bias};
}

}  // namespace

void bind_cpu(py::module_& parent) {
    py::module_ module = parent.def_submodule("cpu", "The similarity sweep on the CPU.");
    module.attr("Buffer") = parent.attr("Buffer");
    module.attr("TILE_ROWS") = cliperase::CACHE_TILE_ROWS;
    module.attr("TILE_COLUMNS") = cliperase::CACHE_TILE_COLUMNS;
    module.attr("TILE_HEADER") = cliperase::CACHE_TILE_HEADER;

    py::class_<OwningInputs>(module, "SimilarityInputs",
                             "See csrc/cpu/sweep.h; features [rows or columns, width] of any strides.")
        .def(py::init(&make_inputs), py::kw_only(), py::arg("image"), py::arg("text"), py::arg("pair_offset"),
             py::arg("scale"), py::arg("teacher_image") = py::none(), py::arg("teacher_text") = py::none(),
             py::arg("teacher_scale") = 0.0, py::arg("row_groups") = py::none(), py::arg("column_groups") = py::none(),
             py::arg("threads") = 1, py::arg("compares") = false, py::arg("row_ids") = py::none(),
             py::arg("column_ids") = py::none(), py::arg("row_levels") = py::none(),
             py::arg("column_levels") = py::none(), py::arg("forget") = py::none())
        .def_property_readonly("row_tiles", [](const OwningInputs& in) { return cliperase::row_tiles(in).tiles; })
        .def_property_readonly("cache_row_bytes",
                               [](const OwningInputs& in) { return cliperase::cache_row_bytes(in); });

    py::class_<cliperase::Workspace>(module, "Workspace", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](cliperase::Workspace& w) {
            return py::buffer_info(w.data(), 1, py::format_descriptor<unsigned char>::format(),
                                   static_cast<py::ssize_t>(w.bytes()));
        });
    module.def("pooled_bytes", &cliperase::pooled_bytes, "Bytes in the pool that no workspace uses.");
    module.def("limit_pooled_bytes", &cliperase::limit_pooled_bytes, py::arg("limit"));
    module.def(
        "instruction_set", [](const Name& name) { return std::string(kernels_named(name).name); },
        py::arg("name") = py::none(),
        "The instruction set in use: `name`, or the widest. ValueError where `name` does not run here.");

    module.def("forward", &forward, py::arg("inputs"), py::kw_only(), py::arg("diagonal") = py::none(),
               py::arg("teacher_diagonal") = py::none(), py::arg("row_stats"), py::arg("column_stats"),
               py::arg("cache") = py::none(), py::arg("instruction_set") = py::none(),
               "Writes the statistics; returns the shift, and the two sums of a comparison.");
    module.def("losses", &losses, py::arg("inputs"), py::kw_only(), py::arg("want_retention"), py::arg("retention"),
               py::arg("consistency"), py::arg("saved_stats"), py::arg("cache") = py::none(),
               py::arg("instruction_set") = py::none(),
               "Writes the two losses and the saved statistics of a whole batch.");
    module.def("backward", &backward, py::arg("inputs"), py::kw_only(), py::arg("saved_stats"),
               py::arg("want_retention"), py::arg("weight_retention"), py::arg("weight_consistency"),
               py::arg("cache") = py::none(), py::arg("grad_image") = py::none(), py::arg("grad_text") = py::none(),
               py::arg("need_scale") = false, py::arg("instruction_set") = py::none(),
               "Writes the gradients for which there is a buffer; returns that of the scale.");
    module.def("compared_backward", &compared_backward, py::arg("inputs"), py::kw_only(), py::arg("terms"),
               py::arg("diagonal") = py::none(), py::arg("pull_forget"), py::arg("pull_anchor"),
               py::arg("cache") = py::none(), py::arg("grad_image") = py::none(), py::arg("grad_text") = py::none(),
               py::arg("instruction_set") = py::none(),
               "Writes the gradients of a comparison for which there is a buffer; returns the sum of dS S.");
    module.def("calibrated", &calibrated, py::arg("inputs"), py::kw_only(), py::arg("terms"), py::arg("factors"),
               py::arg("saved"), py::arg("cache") = py::none(), py::arg("instruction_set") = py::none(),
               "Writes the terms of a joint batch, their factors and what the backward pass needs.");
    module.def("calibrated_backward", &calibrated_backward, py::arg("inputs"), py::kw_only(), py::arg("saved"),
               py::arg("weights"), py::arg("cache") = py::none(), py::arg("grad_image") = py::none(),
               py::arg("grad_text") = py::none(), py::arg("instruction_set") = py::none(),
               "Writes the gradients for which there is a buffer; returns that of the scale.");
    module.def("sigmoid", &sigmoid, py::arg("inputs"), py::kw_only(), py::arg("bias"),
               py::arg("grad_image") = py::none(), py::arg("grad_text") = py::none(), py::arg("need_scale") = false,
               py::arg("need_bias") = false, py::arg("instruction_set") = py::none(),
               "Returns the summed loss and the gradients of scale and bias.");
}

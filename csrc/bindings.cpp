// What Python sees of the CPU sweep: cliperase_fast._C. Tensors come as buffers (buffer.h), each of which is checked against
// what the call is going to read or write.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_buffer.h"
#include "cpu/checks.h"
#include "cpu/finish.h"
#include "cpu/sweep.h"
#include "cpu/workspace.h"

namespace py = pybind11;

#if defined(CLIPERASE_CUDA)
void bind_cuda(py::module_& module);
#endif

namespace {

using cliperase::at_least;
using cliperase::checked;
using cliperase::Dtype;
using cliperase::Expected;
using cliperase::Forward;
using cliperase::Layout;
using cliperase::Matrix;
using cliperase::OwnedBuffer;
using cliperase::Problem;
using cliperase::Size;
using Sizes = std::initializer_list<Size>;
using Name = std::optional<std::string>;

const std::string CPU = "cpu";

// A problem, and what owns the memory that it has the addresses of.
struct HeldProblem : Problem {
    std::vector<py::object> owners;
};

template <typename T>
T* dense(const char* name, const char* dtype, const OwnedBuffer& buffer, Sizes sizes) {
    return static_cast<T*>(checked(buffer, {name, {dtype}, sizes, Layout::dense, CPU}));
}

float* floats(const char* name, const OwnedBuffer& buffer, Sizes sizes) { return dense<float>(name, "float32", buffer, sizes); }

// The same of what may be None.
float* floats(const char* name, const OwnedBuffer* buffer, Sizes sizes) {
    return buffer == nullptr ? nullptr : floats(name, *buffer, sizes);
}

Matrix features(const char* name, const OwnedBuffer& buffer, Sizes sizes) {
    const void* const data = checked(buffer, {name, {"float32", "bfloat16", "float16"}, sizes, Layout::any, CPU});
    const Dtype dtype = buffer.dtype == "float32" ? Dtype::float32 : buffer.dtype == "bfloat16" ? Dtype::bfloat16 : Dtype::float16;
    return {data, buffer.strides[0], buffer.strides[1], dtype};
}

HeldProblem make_problem(const OwnedBuffer& image, const OwnedBuffer& text, std::int64_t first, double scale,
                         const OwnedBuffer* teacher_image, const OwnedBuffer* teacher_text, double teacher_scale,
                         const OwnedBuffer* row_groups, const OwnedBuffer* column_groups, int threads) {
    HeldProblem p{};
    p.image = features("image", image, {at_least(1), at_least(1)});
    p.rows = image.sizes[0], p.width = image.sizes[1];
    p.text = features("text", text, {at_least(1), p.width});
    p.columns = text.sizes[0], p.first = first, p.scale = static_cast<float>(scale), p.threads = threads;
    if ((teacher_image == nullptr) != (teacher_text == nullptr))
        throw std::invalid_argument("teacher_image and teacher_text come together or not at all");
    if ((p.has_teacher = teacher_image != nullptr)) {
        p.teacher_image = features("teacher_image", *teacher_image, {p.rows, at_least(1)});
        p.teacher_width = teacher_image->sizes[1], p.teacher_scale = static_cast<float>(teacher_scale);
        p.teacher_text = features("teacher_text", *teacher_text, {p.columns, p.teacher_width});
    }
    if ((row_groups == nullptr) != (column_groups == nullptr))
        throw std::invalid_argument("row_groups and column_groups come together or not at all");
    if (row_groups != nullptr) {
        p.row_groups = dense<const std::int32_t>("row_groups", "int32", *row_groups, {p.rows});
        p.column_groups = dense<const std::int32_t>("column_groups", "int32", *column_groups, {p.columns});
    }
    cliperase::check(p);
    for (const OwnedBuffer* buffer : {&image, &text, teacher_image, teacher_text, row_groups, column_groups})
        if (buffer != nullptr) p.owners.push_back(buffer->owner);
    return p;
}

struct Kept {
    void* data = nullptr;
    std::int64_t rows = 0;  // the first ones, which the memory is for
};

Kept kept_rows(const Problem& p, const OwnedBuffer* kept) {
    if (kept == nullptr) return {};
    const std::int64_t of_tiles = cliperase::kept_row_bytes(p), tile = cliperase::KEPT_TILE_ROWS;
    void* const data = checked(*kept, {"kept", {"uint8"}, {at_least(of_tiles)}, Layout::dense, CPU, sizeof(float)});
    const std::int64_t bytes = kept->sizes[0], most = (p.rows + tile - 1) / tile * of_tiles;
    if (bytes % of_tiles != 0 || bytes > most)
        throw std::invalid_argument("kept has " + std::to_string(bytes) + " bytes; it must have a multiple of " +
                                    std::to_string(of_tiles) + ", at most " + std::to_string(most));
    return {data, std::min(p.rows, bytes / of_tiles * tile)};
}

const cliperase::Engine& engine(const Name& name) {
    const cliperase::Engine* const found = cliperase::choose_engine(name ? name->c_str() : nullptr);
    if (found == nullptr)
        throw std::invalid_argument("no instruction set " + *name + " here; known are avx512, avx2 and portable");
    return *found;
}

void run_forward(const Problem& p, const Forward& out, const cliperase::Engine& chosen) {
    cliperase::check(p, out);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.forward_scratch(p));
    chosen.forward(p, out, scratch.data());
}

float forward(const HeldProblem& p, const OwnedBuffer* diagonal, const OwnedBuffer* teacher_diagonal, const OwnedBuffer& row_sums,
              const OwnedBuffer& column_sums, const OwnedBuffer* kept_buffer, const Name& isa) {
    const Kept kept = kept_rows(p, kept_buffer);
    const std::int64_t planes = cliperase::planes(p);
    float shift = 0;
    const Forward out{floats("diagonal", diagonal, {p.rows}), floats("teacher_diagonal", teacher_diagonal, {p.rows}),
                      floats("row_sums", row_sums, {planes, p.rows}), floats("column_sums", column_sums, {planes, p.columns}),
                      &shift, kept.data, kept.rows};
    run_forward(p, out, engine(isa));
    return shift;
}

void losses(const HeldProblem& p, bool want_retention, const OwnedBuffer& retention, const OwnedBuffer& consistency,
            const OwnedBuffer& state, const OwnedBuffer* kept_buffer, const Name& isa) {
    if (p.rows != p.columns || p.first != 0) throw std::invalid_argument("the losses are those of a whole batch");
    const Kept kept = kept_rows(p, kept_buffer);
    const std::int64_t n = p.rows, sums = cliperase::planes(p) * n;
    float* const to_retention = floats("retention", retention, {});
    float* const to_consistency = floats("consistency", consistency, {});
    float* const to_state = floats("state", state, {cliperase::STATE_PLANES, 2 * n});
    const cliperase::Workspace memory(static_cast<std::size_t>(2 * sums + 2 * n) * sizeof(float));
    float *rows = reinterpret_cast<float*>(memory.data()), shift = 0;
    const Forward found{rows + 2 * sums, rows + 2 * sums + n, rows, rows + sums, &shift, kept.data, kept.rows};
    run_forward(p, found, engine(isa));
    const cliperase::Losses result = cliperase::finish(p, want_retention, found, to_state);
    const double pairs = static_cast<double>(n);
    *to_retention = static_cast<float>(0.5 * result.retention / pairs);
    *to_consistency = static_cast<float>(result.consistency / pairs);
}

float* gradient(const char* name, const OwnedBuffer* buffer, std::int64_t rows, std::int64_t width) {
    return floats(name, buffer, {rows, cliperase::gradient_stride(width)});
}

double backward(const HeldProblem& p, const OwnedBuffer& state, bool want_retention, double weight_retention,
                double weight_consistency, const OwnedBuffer* kept_buffer, const OwnedBuffer* grad_image,
                const OwnedBuffer* grad_text, bool need_scale, const Name& isa) {
    const Kept kept = kept_rows(p, kept_buffer);
    double grad_scale = 0;
    cliperase::Backward b{};
    b.kept = kept.data, b.kept_rows = kept.rows;
    b.grad_image = gradient("grad_image", grad_image, p.rows, p.width);
    b.grad_text = gradient("grad_text", grad_text, p.columns, p.width);
    b.grad_scale = need_scale ? &grad_scale : nullptr;
    const float* const from_state = floats("state", state, {cliperase::STATE_PLANES, p.rows + p.columns});
    const cliperase::Engine& chosen = engine(isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace terms(static_cast<std::size_t>(cliperase::terms_floats(p)) * sizeof(float));
    cliperase::gradient_terms(p, from_state, want_retention, weight_retention, weight_consistency,
                              reinterpret_cast<float*>(terms.data()), b);
    cliperase::check(p, b);
    const cliperase::Workspace scratch(chosen.backward_scratch(p, b));
    chosen.backward(p, b, scratch.data());
    return grad_scale;
}

std::tuple<double, double, double> sigmoid(const HeldProblem& p, double bias, const OwnedBuffer* grad_image,
                                           const OwnedBuffer* grad_text, bool need_scale, bool need_bias, const Name& isa) {
    double loss = 0, grad_scale = 0, grad_bias = 0;
    const cliperase::Sigmoid s{static_cast<float>(bias),
                               &loss,
                               gradient("grad_image", grad_image, p.rows, p.width),
                               gradient("grad_text", grad_text, p.columns, p.width),
                               need_scale ? &grad_scale : nullptr,
                               need_bias ? &grad_bias : nullptr};
    cliperase::check(p, s);
    const cliperase::Engine& chosen = engine(isa);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.sigmoid_scratch(p, s));
    chosen.sigmoid(p, s, scratch.data());
    return {loss, grad_scale, grad_bias};
}

void bind_cpu(py::module_ module) {
    module.doc() = "The similarity sweep on the CPU.";
    module.attr("TILE_ROWS") = cliperase::KEPT_TILE_ROWS;
    module.attr("TILE_COLUMNS") = cliperase::KEPT_TILE_COLUMNS;
    module.attr("TILE_HEAD") = cliperase::KEPT_TILE_HEAD;

    py::class_<HeldProblem>(module, "Problem", "See csrc/cpu/sweep.h; features [rows or columns, width] of any strides.")
        .def(py::init(&make_problem), py::kw_only(), py::arg("image"), py::arg("text"), py::arg("first"), py::arg("scale"),
             py::arg("teacher_image") = py::none(), py::arg("teacher_text") = py::none(), py::arg("teacher_scale") = 0.0,
             py::arg("row_groups") = py::none(), py::arg("column_groups") = py::none(), py::arg("threads") = 1);

    py::class_<cliperase::Workspace>(module, "Workspace", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](cliperase::Workspace& w) {
            return py::buffer_info(w.data(), 1, py::format_descriptor<unsigned char>::format(),
                                   static_cast<py::ssize_t>(w.bytes()));
        });
    module.def("cached_bytes", &cliperase::cached_bytes, "Bytes in the pool that no workspace uses.");
    module.def("limit_cached_bytes", &cliperase::limit_cached_bytes, py::arg("most"));
    module.def(
        "instruction_set", [](const Name& name) { return std::string(engine(name).name); }, py::arg("name") = py::none(),
        "The one that is chosen; ValueError where the named one does not run here.");

    module.def("forward", &forward, py::arg("problem"), py::kw_only(), py::arg("diagonal") = py::none(),
               py::arg("teacher_diagonal") = py::none(), py::arg("row_sums"), py::arg("column_sums"),
               py::arg("kept") = py::none(), py::arg("instruction_set") = py::none(), "Writes the sums; returns the shift.");
    module.def("losses", &losses, py::arg("problem"), py::kw_only(), py::arg("want_retention"), py::arg("retention"),
               py::arg("consistency"), py::arg("state"), py::arg("kept") = py::none(), py::arg("instruction_set") = py::none(),
               "Writes the two means and the state of a whole batch.");
    module.def("backward", &backward, py::arg("problem"), py::kw_only(), py::arg("state"), py::arg("want_retention"),
               py::arg("weight_retention"), py::arg("weight_consistency"), py::arg("kept") = py::none(),
               py::arg("grad_image") = py::none(), py::arg("grad_text") = py::none(), py::arg("need_scale") = false,
               py::arg("instruction_set") = py::none(), "Writes the gradients that there is memory for; returns the scale's.");
    module.def("sigmoid", &sigmoid, py::arg("problem"), py::kw_only(), py::arg("bias"), py::arg("grad_image") = py::none(),
               py::arg("grad_text") = py::none(), py::arg("need_scale") = false, py::arg("need_bias") = false,
               py::arg("instruction_set") = py::none(), "The summed loss, and the gradients of scale and bias.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled parts of cliperase_fast; buffers in, nothing of torch's C++ interface.";
    cliperase::bind_buffer(module);
    py::module_ cpu = module.def_submodule("cpu");
    cpu.attr("Buffer") = module.attr("Buffer");
    bind_cpu(cpu);
#if defined(CLIPERASE_CUDA)
    bind_cuda(module);
#endif
    // One more whenever an argument here changes its meaning; cliperase_fast/ops/native/extension.py asks for the same.
    module.attr("INTERFACE") = 5;
    py::dict info;
    info["compiler"] = CLIPERASE_COMPILER;
    info["openmp"] = bool(CLIPERASE_OPENMP);
    info["cuda"] = CLIPERASE_CUDA_VERSION;
    info["cuda_architectures"] = CLIPERASE_CUDA_ARCHITECTURES;
    module.attr("build_info") = info;
}

// What Python sees of the CPU sweep: cliperase_fast._C. Tensors come as addresses, sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/checks.h"
#include "cpu/finish.h"
#include "cpu/sweep.h"
#include "cpu/workspace.h"

namespace py = pybind11;

#if defined(CLIPERASE_CUDA)
void bind_cuda(py::module_& module);
#endif

namespace {

using cliperase::Dtype;
using cliperase::Forward;
using cliperase::Matrix;
using cliperase::Problem;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

const cliperase::Engine& engine(const std::optional<std::string>& name) {
    const cliperase::Engine* const found = cliperase::choose_engine(name ? name->c_str() : nullptr);
    if (found == nullptr)
        throw std::invalid_argument("no instruction set " + *name + " here; known are avx512, avx2 and portable");
    return *found;
}

void forward(const Problem& p, const Forward& out, const cliperase::Engine& chosen) {
    cliperase::check(p, out);
    const py::gil_scoped_release released;
    const cliperase::Workspace scratch(chosen.forward_scratch(p));
    chosen.forward(p, out, scratch.data());
}

void bind_cpu(py::module_ module) {
    module.doc() = "The similarity sweep on the CPU.";
    module.attr("TILE_ROWS") = cliperase::KEPT_TILE_ROWS;
    module.attr("TILE_COLUMNS") = cliperase::KEPT_TILE_COLUMNS;
    module.attr("TILE_HEAD") = cliperase::KEPT_TILE_HEAD;

    py::enum_<Dtype>(module, "Dtype")
        .value("float32", Dtype::float32)
        .value("bfloat16", Dtype::bfloat16)
        .value("float16", Dtype::float16);

    py::class_<Matrix>(module, "Matrix")
        .def(py::init([](Address data, std::int64_t row, std::int64_t column, Dtype dtype) {
                 return Matrix{pointer<const void>(data), row, column, dtype};
             }),
             py::arg("data"), py::arg("row_stride"), py::arg("column_stride"), py::arg("dtype"));

    py::class_<Problem>(module, "Problem")
        .def(py::init([](std::int64_t rows, std::int64_t columns, std::int64_t first, std::int64_t width, const Matrix& image,
                         const Matrix& text, double scale, std::int64_t teacher_width,
                         const std::optional<Matrix>& teacher_image, const std::optional<Matrix>& teacher_text,
                         double teacher_scale, Address row_groups, Address column_groups, int threads) {
                 Problem p{};
                 p.rows = rows, p.columns = columns, p.first = first, p.width = width;
                 p.image = image, p.text = text, p.scale = static_cast<float>(scale);
                 p.has_teacher = teacher_image.has_value();
                 if (teacher_image.has_value() != teacher_text.has_value())
                     throw std::invalid_argument("teacher_image and teacher_text come together or not at all");
                 if (p.has_teacher) {
                     p.teacher_width = teacher_width, p.teacher_scale = static_cast<float>(teacher_scale);
                     p.teacher_image = *teacher_image, p.teacher_text = *teacher_text;
                 }
                 p.row_groups = pointer<const std::int32_t>(row_groups);
                 p.column_groups = pointer<const std::int32_t>(column_groups);
                 p.threads = threads;
                 cliperase::check(p);
                 return p;
             }),
             py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("first"), py::arg("width"), py::arg("image"),
             py::arg("text"), py::arg("scale"), py::arg("teacher_width") = 0, py::arg("teacher_image") = py::none(),
             py::arg("teacher_text") = py::none(), py::arg("teacher_scale") = 0.0, py::arg("row_groups") = 0,
             py::arg("column_groups") = 0, py::arg("threads") = 1);

    py::class_<cliperase::Workspace>(module, "Workspace", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](cliperase::Workspace& w) {
            return py::buffer_info(w.data(), 1, py::format_descriptor<unsigned char>::format(),
                                   static_cast<py::ssize_t>(w.bytes()));
        });
    module.def("cached_bytes", &cliperase::cached_bytes, "Bytes in the pool that no workspace uses.");
    module.def("limit_cached_bytes", &cliperase::limit_cached_bytes, py::arg("most"));
    module.def(
        "instruction_set", [](const std::optional<std::string>& name) { return std::string(engine(name).name); },
        py::arg("name") = py::none(), "The one that is chosen; ValueError where the named one does not run here.");

    module.def(
        "forward",
        [](const Problem& p, Address diagonal, Address teacher_diagonal, Address row_sums, Address column_sums, Address kept,
           std::int64_t kept_rows, const std::optional<std::string>& isa) {
            float shift = 0;
            forward(p,
                    {pointer<float>(diagonal), pointer<float>(teacher_diagonal), pointer<float>(row_sums),
                     pointer<float>(column_sums), &shift, pointer<void>(kept), kept_rows},
                    engine(isa));
            return shift;
        },
        py::arg("problem"), py::kw_only(), py::arg("diagonal") = 0, py::arg("teacher_diagonal") = 0, py::arg("row_sums"),
        py::arg("column_sums"), py::arg("kept") = 0, py::arg("kept_rows") = 0, py::arg("instruction_set") = py::none(),
        "Writes the sums; returns the shift.");

    module.def(
        "losses",
        [](const Problem& p, bool want_retention, Address retention, Address consistency, Address state, Address kept,
           std::int64_t kept_rows, const std::optional<std::string>& isa) {
            if (p.rows != p.columns || p.first != 0) throw std::invalid_argument("the losses are those of a whole batch");
            if (state == 0 || retention == 0 || consistency == 0) throw std::invalid_argument("a result is a null pointer");
            const std::int64_t n = p.rows, sums = cliperase::planes(p) * n;
            const cliperase::Workspace memory(static_cast<std::size_t>(2 * sums + 2 * n) * sizeof(float));
            float *rows = reinterpret_cast<float*>(memory.data()), shift = 0;
            const Forward found{rows + 2 * sums, rows + 2 * sums + n, rows, rows + sums, &shift, pointer<void>(kept),
                                kept_rows};
            forward(p, found, engine(isa));
            const cliperase::Losses losses =
                cliperase::finish(p, want_retention, found, pointer<float>(state));
            const double pairs = static_cast<double>(n);
            *pointer<float>(retention) = static_cast<float>(0.5 * losses.retention / pairs);
            *pointer<float>(consistency) = static_cast<float>(losses.consistency / pairs);
        },
        py::arg("problem"), py::kw_only(), py::arg("want_retention"), py::arg("retention"), py::arg("consistency"),
        py::arg("state"), py::arg("kept") = 0, py::arg("kept_rows") = 0, py::arg("instruction_set") = py::none(),
        "Writes the two means, float32, and the state of a whole batch.");

    module.def(
        "backward",
        [](const Problem& p, Address state, bool want_retention, double weight_retention, double weight_consistency,
           Address kept, std::int64_t kept_rows, Address grad_image, Address grad_text, bool need_scale,
           const std::optional<std::string>& isa) {
            double grad_scale = 0;
            cliperase::Backward b{};
            b.kept = pointer<const void>(kept), b.kept_rows = kept_rows;
            b.grad_image = pointer<float>(grad_image), b.grad_text = pointer<float>(grad_text);
            b.grad_scale = need_scale ? &grad_scale : nullptr;
            if (state == 0) throw std::invalid_argument("state is a null pointer");
            const cliperase::Engine& chosen = engine(isa);
            const py::gil_scoped_release released;
            const cliperase::Workspace terms(static_cast<std::size_t>(cliperase::terms_floats(p)) * sizeof(float));
            cliperase::gradient_terms(p, pointer<const float>(state), want_retention, weight_retention, weight_consistency,
                                      reinterpret_cast<float*>(terms.data()), b);
            cliperase::check(p, b);
            const cliperase::Workspace scratch(chosen.backward_scratch(p, b));
            chosen.backward(p, b, scratch.data());
            return grad_scale;
        },
        py::arg("problem"), py::kw_only(), py::arg("state"), py::arg("want_retention"), py::arg("weight_retention"),
        py::arg("weight_consistency"), py::arg("kept") = 0, py::arg("kept_rows") = 0, py::arg("grad_image") = 0,
        py::arg("grad_text") = 0, py::arg("need_scale") = false, py::arg("instruction_set") = py::none());

    module.def(
        "sigmoid",
        [](const Problem& p, double bias, Address grad_image, Address grad_text, bool need_scale, bool need_bias,
           const std::optional<std::string>& isa) {
            double loss = 0, grad_scale = 0, grad_bias = 0;
            const cliperase::Sigmoid s{static_cast<float>(bias), &loss, pointer<float>(grad_image), pointer<float>(grad_text),
                                       need_scale ? &grad_scale : nullptr, need_bias ? &grad_bias : nullptr};
            cliperase::check(p, s);
            const cliperase::Engine& chosen = engine(isa);
            const py::gil_scoped_release released;
            const cliperase::Workspace scratch(chosen.sigmoid_scratch(p, s));
            chosen.sigmoid(p, s, scratch.data());
            return std::tuple(loss, grad_scale, grad_bias);
        },
        py::arg("problem"), py::kw_only(), py::arg("bias"), py::arg("grad_image") = 0, py::arg("grad_text") = 0,
        py::arg("need_scale") = false, py::arg("need_bias") = false, py::arg("instruction_set") = py::none());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled parts of cliperase_fast; addresses in, nothing of torch's C++ interface.";
    bind_cpu(module.def_submodule("cpu"));
#if defined(CLIPERASE_CUDA)
    bind_cuda(module);
#endif
    // One more whenever an argument here changes its meaning; cliperase_fast/ops/native/extension.py asks for the same.
    module.attr("INTERFACE") = 3;
    py::dict info;
    info["compiler"] = CLIPERASE_COMPILER;
    info["openmp"] = bool(CLIPERASE_OPENMP);
    info["cuda"] = CLIPERASE_CUDA_VERSION;
    info["cuda_architectures"] = CLIPERASE_CUDA_ARCHITECTURES;
    module.attr("build_info") = info;
}

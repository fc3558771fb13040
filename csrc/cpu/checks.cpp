#include "checks.h"

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace cliperase {
namespace {

// Products of a few sizes below this fit 64 bits.
constexpr std::int64_t MOST_ROWS = std::int64_t{1} << 31, MOST_WIDTH = std::int64_t{1} << 20;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_between(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        refuse(std::string(name) + " = " + std::to_string(value) + " must lie between " + std::to_string(least) + " and " +
               std::to_string(most));
}

void check_pointer(const char* name, const void* data, std::size_t alignment) {
    if (data == nullptr) refuse(std::string(name) + " is a null pointer");
    if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0)
        refuse(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

void check_matrix(const char* name, const Matrix& m, std::int64_t rows, std::int64_t width) {
    check_pointer(name, m.data, m.dtype == Dtype::float32 ? 4 : 2);
    const std::int64_t most = std::numeric_limits<std::int64_t>::max() / 8;
    for (const auto& [stride, count] : {std::pair{m.row, rows}, std::pair{m.column, width}})
        if (stride < 0 || (count > 1 && stride > most / count))
            refuse(std::string(name) + " has a stride of " + std::to_string(stride) + ", which its size does not allow");
}

void check_softmax(const char* name, const Softmax& softmax) {
    for (const float* plane : {softmax.row_anchor, softmax.column_anchor, softmax.row_factor, softmax.column_factor})
        check_pointer(name, plane, sizeof(float));
}

void check_kept(const Problem& p, const void* kept, std::int64_t rows) {
    check_between("kept_rows", rows, 0, p.rows);
    if (rows == 0) return;
    check_pointer("kept", kept, sizeof(float));
    if (rows != p.rows && rows % KEPT_TILE_ROWS != 0)
        refuse("kept_rows = " + std::to_string(rows) + " must be all rows or a multiple of " +
               std::to_string(KEPT_TILE_ROWS));
}

}  // namespace

void check(const Problem& p) {
    check_between("rows", p.rows, 1, MOST_ROWS);
    check_between("columns", p.columns, 1, MOST_ROWS);
    if (p.paired()) check_between("first", p.first, 0, p.columns - p.rows);
    if (p.first > p.columns) check_between("first", p.first, 0, p.columns);
    check_between("width", p.width, 1, MOST_WIDTH);
    check_between("threads", p.threads, 1, 4096);
    check_matrix("image", p.image, p.rows, p.width);
    check_matrix("text", p.text, p.columns, p.width);
    if (p.has_teacher) {
        check_between("teacher_width", p.teacher_width, 1, MOST_WIDTH);
        check_matrix("teacher_image", p.teacher_image, p.rows, p.teacher_width);
        check_matrix("teacher_text", p.teacher_text, p.columns, p.teacher_width);
    }
    if ((p.row_groups == nullptr) != (p.column_groups == nullptr))
        refuse("row_groups and column_groups come together or not at all");
    if (p.row_groups != nullptr) {
        check_pointer("row_groups", p.row_groups, sizeof(std::int32_t));
        check_pointer("column_groups", p.column_groups, sizeof(std::int32_t));
    }
}

void check(const Problem& p, const Forward& out) {
    if (p.paired()) check_pointer("diagonal", out.diagonal, sizeof(float));
    if (p.paired() && p.has_teacher) check_pointer("teacher_diagonal", out.teacher_diagonal, sizeof(float));
    check_pointer("row_sums", out.row_sums, sizeof(float));
    check_pointer("column_sums", out.column_sums, sizeof(float));
    check_kept(p, out.kept, out.kept_rows);
}

void check(const Problem& p, const Backward& b) {
    check_softmax("student", b.student);
    if (p.has_teacher) check_softmax("teacher", b.teacher);
    if (p.has_masked()) check_softmax("masked", b.masked);
    if (p.paired()) check_pointer("diagonal", b.diagonal, sizeof(float));
    check_kept(p, b.kept, b.kept_rows);
    if (b.grad_scale != nullptr && b.grad_image == nullptr) refuse("the gradient of scale needs grad_image");
}

void check(const Problem& p, const Sigmoid& s) {
    if (p.has_teacher || p.row_groups != nullptr) refuse("the sigmoid loss takes neither a teacher nor groups");
    check_pointer("loss", s.loss, sizeof(double));
    if (s.grad_scale != nullptr && s.grad_image == nullptr) refuse("the gradient of scale needs grad_image");
}

}  // namespace cliperase

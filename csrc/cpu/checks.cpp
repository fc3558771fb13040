#include "sweep.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

namespace cliperase {
namespace {

// Products of sizes up to these fit 64 bits.
constexpr std::int64_t MAX_ROWS = std::int64_t{1} << 31, MAX_WIDTH = std::int64_t{1} << 20;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_between(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        refuse(std::string(name) + " = " + std::to_string(value) + " must lie between " + std::to_string(least) +
               " and " + std::to_string(most));
}

void check_pointer(const char* name, const void* data, std::size_t alignment) {
    if (data == nullptr) refuse(std::string(name) + " is a null pointer");
    if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0)
        refuse(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

void check_matrix(const char* name, const Matrix& m, std::int64_t rows, std::int64_t width) {
    check_pointer(name, m.data, info(m.dtype).bytes);
    const std::int64_t limit = std::numeric_limits<std::int64_t>::max() / 8;
    for (const auto& [stride, count] : {std::pair{m.row, rows}, std::pair{m.column, width}})
        if (stride < 0 || (count > 1 && stride > limit / count))
            refuse(std::string(name) + " has a stride of " + std::to_string(stride) +
                   ", which is not possible for its size");
}

void check_softmax(const char* name, const Softmax& softmax) {
    for (const float* values : {softmax.row_anchor, softmax.column_anchor, softmax.row_factor, softmax.column_factor})
        check_pointer(name, values, sizeof(float));
}

void check_cache(const SimilarityInputs& in, const void* cache, std::int64_t rows) {
    check_between("cached_rows", rows, 0, in.rows);
    if (rows == 0) return;
    check_pointer("cache", cache, sizeof(float));
    if (rows != in.rows && rows % CACHE_TILE_ROWS != 0 && rows != row_tiles(in).cut)
        refuse("cached_rows = " + std::to_string(rows) + " must be all rows or a multiple of " +
               std::to_string(CACHE_TILE_ROWS));
}

void check_joint(const SimilarityInputs& in) {
    const Comparison& comparison = in.comparison;
    const std::int64_t begin = comparison.forget_begin, end = comparison.forget_end;
    if (!comparison.wanted || !in.has_teacher) refuse("a joint batch needs a comparison, and that a teacher");
    if (in.scale == 0 || in.teacher_scale == 0) refuse("scale and teacher_scale must not be 0 for a comparison");
    if (in.rows != in.columns || in.pair_offset != 0)
        refuse("a joint batch has as many rows as columns, and pair_offset = 0");
    check_between("forget_end", end, 0, in.rows);
    check_between("forget_begin", begin, 0, end);
    if (begin != 0 && end != in.rows) refuse("the pairs to forget must be the first or the last ones");
    const bool by_ids = comparison.row_ids != nullptr;
    if (by_ids != (comparison.column_ids != nullptr) || by_ids != (in.row_groups != nullptr))
        refuse("a joint batch needs all of row_ids, column_ids, row_groups and column_groups, or none");
    for (const void* data : {comparison.row_levels, comparison.column_levels})
        check_pointer("the levels of edited entries", data, sizeof(float));
}

}  // namespace

void check(const SimilarityInputs& in) {
    check_between("rows", in.rows, 1, MAX_ROWS);
    check_between("columns", in.columns, 1, MAX_ROWS);
    if (in.paired()) check_between("pair_offset", in.pair_offset, 0, in.columns - in.rows);
    if (in.pair_offset > in.columns) check_between("pair_offset", in.pair_offset, 0, in.columns);
    check_between("width", in.width, 1, MAX_WIDTH);
    check_between("threads", in.threads, 1, 4096);
    check_matrix("image", in.image, in.rows, in.width);
    check_matrix("text", in.text, in.columns, in.width);
    if (in.has_teacher) {
        check_between("teacher_width", in.teacher_width, 1, MAX_WIDTH);
        check_matrix("teacher_image", in.teacher_image, in.rows, in.teacher_width);
        check_matrix("teacher_text", in.teacher_text, in.columns, in.teacher_width);
    }
    if ((in.row_groups == nullptr) != (in.column_groups == nullptr))
        refuse("row_groups and column_groups must be given together");
    if (in.row_groups != nullptr) {
        check_pointer("row_groups", in.row_groups, sizeof(std::int32_t));
        check_pointer("column_groups", in.column_groups, sizeof(std::int32_t));
    }
    const Comparison& comparison = in.comparison;
    if (comparison.joint) return check_joint(in);
    const void* const edits[] = {comparison.row_ids, comparison.column_ids, comparison.row_levels,
                                 comparison.column_levels};
    const bool edited =
        std::any_of(std::begin(edits), std::end(edits), [](const void* data) { return data != nullptr; });
    if (!comparison.wanted && !edited) return;
    if (!comparison.wanted || !in.has_teacher) refuse("edited entries need a comparison, and that a teacher");
    if (in.scale == 0 || in.teacher_scale == 0) refuse("scale and teacher_scale must not be 0 for a comparison");
    if (edited)
        for (const void* data : edits) check_pointer("the ids and levels of edited entries", data, sizeof(float));
}

void check(const SimilarityInputs& in, const Forward& out) {
    if (in.paired()) check_pointer("diagonal", out.diagonal, sizeof(float));
    if (in.paired() && in.has_teacher) check_pointer("teacher_diagonal", out.teacher_diagonal, sizeof(float));
    check_pointer("row_stats", out.row_stats, sizeof(float));
    check_pointer("column_stats", out.column_stats, sizeof(float));
    check_cache(in, out.cache, out.cached_rows);
    if (in.comparison.wanted) check_pointer("squares", out.squares, sizeof(double));
}

void check(const SimilarityInputs& in, const Backward& b) {
    check_softmax("student", b.student);
    if (in.has_teacher) check_softmax("teacher", b.teacher);
    if (in.has_masked() && in.row_groups != nullptr) check_softmax("masked", b.masked);
    if (in.has_masked() && in.row_groups == nullptr) check_softmax("retained", b.retained);
    if (in.paired()) check_pointer("diagonal", b.diagonal, sizeof(float));
    check_cache(in, b.cache, b.cached_rows);
    if (b.grad_scale != nullptr && !b.grad_image) refuse("the gradient of scale needs grad_image");
}

void check(const SimilarityInputs& in, const Sigmoid& s) {
    if (in.has_teacher || in.row_groups != nullptr) refuse("the sigmoid loss takes neither a teacher nor groups");
    check_pointer("loss", s.loss, sizeof(double));
    if (s.grad_scale != nullptr && !s.grad_image) refuse("the gradient of scale needs grad_image");
}

}  // namespace cliperase

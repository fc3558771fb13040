// Which buffers are refused before they are read or written, and the message.
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "expect.h"

namespace {

using cliperase::at_least;
using cliperase::Buffer;
using cliperase::checked;
using cliperase::Dtype;
using cliperase::Expected;
using cliperase::Layout;

const std::string CPU = "cpu";

void expect_refused(const Buffer& buffer, const Expected& expected, const std::string& why) {
    try {
        checked(buffer, expected);
    } catch (const std::invalid_argument& error) {
        if (std::string(error.what()).find(why) == std::string::npos)
            fail("buffers", "checks", std::string(": ") + error.what());
        return;
    }
    fail("buffers", "checks", ": not refused: " + why);
}

void expect_taken(const Buffer& buffer, const Expected& expected) {
    try {
        if (checked(buffer, expected) != reinterpret_cast<void*>(buffer.address))
            fail("buffers", "checks", ": another address");
    } catch (const std::invalid_argument& error) {
        fail("buffers", "checks", std::string(": ") + error.what());
    }
}

}  // namespace

void check_buffers() {
    const Buffer good{4096, "float32", 2, {3, 5}, {5, 1}, CPU};
    const auto changed = [&](auto change) {
        Buffer out = good;
        change(out);
        return out;
    };
    const Expected dense{"sums", {Dtype::float32}, {3, 5}, Layout::dense, CPU};
    const Expected rows{"sums", {Dtype::float32}, {3, at_least(4)}, Layout::rows, CPU, 16};
    const Expected any{"sums", cliperase::FEATURE_DTYPES, {3, 5}, Layout::any, CPU};
    expect_taken(good, dense), expect_taken(good, any);
    expect_taken(changed([](Buffer& b) { b.strides = {8, 1}; }), rows);
    expect_taken(changed([](Buffer& b) { b.strides = {0, 7}; }), any);  // rows that are all the same
    expect_taken(changed([](Buffer& b) { b.sizes = {3, 1}, b.strides = {1, -9}; }),
                 {"sums", {Dtype::float32}, {3, 1}, Layout::dense, CPU});
    expect_taken({8, "float32", 0, {}, {}, CPU}, {"loss", {Dtype::float32}, {}, Layout::dense, CPU});

    expect_refused(changed([](Buffer& b) { b.dtype = "float64"; }), dense,
                   "sums must be contiguous float32 [3, 5] on cpu, not float64 [3, 5] with strides [5, 1] on cpu");
    expect_refused(changed([](Buffer& b) { b.dtype = "float64"; }), any,
                   "must be float32, bfloat16 or float16 [3, 5] on cpu, not");
    expect_refused(changed([](Buffer& b) { b.device = "meta"; }), dense,
                   "on cpu, not float32 [3, 5] with strides [5, 1] on meta");
    expect_refused(changed([](Buffer& b) { b.sizes[1] = 4; }), dense, "not float32 [3, 4]");
    expect_refused(changed([](Buffer& b) { b.sizes[1] = 6; }), dense, "not float32 [3, 6]");
    expect_refused(changed([](Buffer& b) { b.sizes[1] = 3; }), rows,
                   "[3, at least 4] with contiguous rows on cpu, not float32 [3, 3]");
    expect_refused(changed([](Buffer& b) { b.dimensions = 1; }), dense, "not float32 [3] with strides [5]");
    expect_refused(changed([](Buffer& b) { b.strides = {6, 1}; }), dense, "with strides [6, 1]");
    expect_refused(changed([](Buffer& b) { b.strides = {1, 3}; }), dense, "with strides [1, 3]");
    expect_refused(changed([](Buffer& b) { b.strides = {0, 1}; }), dense, "with strides [0, 1]");
    expect_refused(changed([](Buffer& b) { b.strides = {4, 1}; }), rows, "with strides [4, 1]");  // overlapping rows
    expect_refused(changed([](Buffer& b) { b.strides = {8, 2}; }), rows, "with strides [8, 2]");
    expect_refused(good, rows, "sums must begin, and each of its rows, at a multiple of 16 bytes");
    expect_refused(changed([](Buffer& b) { b.strides = {5, -1}; }), any, "with strides [5, -1]");
    expect_refused(changed([](Buffer& b) { b.address = 0; }), dense, "sums is a null pointer");
    expect_refused(changed([](Buffer& b) { b.address = 4098; }), dense, "sums must begin at a multiple of 4 bytes");
    for (const std::int64_t stride : {INT64_MAX, INT64_MAX / 2, INT64_MAX / 8})
        expect_refused(changed([=](Buffer& b) { b.strides = {stride, 1}; }), any, "sums reaches beyond 64 bits");
    expect_refused(changed([](Buffer& b) { b.address = UINTPTR_MAX - 15; }), dense, "sums reaches beyond 64 bits");
    const std::int64_t wide = std::int64_t{1} << 40;
    expect_refused({4096, "float32", 2, {wide, wide}, {wide, 1}, CPU},
                   {"sums", {Dtype::float32}, {wide, wide}, Layout::dense, CPU}, "sums");
}

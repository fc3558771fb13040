#include "buffer.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace cliperase {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <typename Numbers, typename Text>
std::string listed(const Numbers& numbers, const Text& text) {
    std::string out = "[";
    for (const auto& number : numbers) out += (out.size() > 1 ? ", " : "") + text(number);
    return out + "]";
}

std::string listed(const std::array<std::int64_t, MAX_DIMENSIONS>& numbers, int dimensions) {
    std::string out = "[";
    for (int at = 0; at < dimensions; ++at) out += (at > 0 ? ", " : "") + std::to_string(numbers[at]);
    return out + "]";
}

std::string described(const Buffer& b) {
    return b.dtype + " " + listed(b.sizes, b.dimensions) + " with strides " + listed(b.strides, b.dimensions) + " on " +
           b.device;
}

std::string described(const Expected& e) {
    std::string out = e.layout == Layout::dense ? "contiguous " : "";
    for (const Dtype* dtype = e.dtypes.begin(); dtype != e.dtypes.end(); ++dtype)
        out += std::string(dtype == e.dtypes.begin()     ? ""
                           : dtype + 1 == e.dtypes.end() ? " or "
                                                         : ", ") +
               info(*dtype).name;
    out += " " + listed(e.sizes,
                        [](const Size& size) { return (size.exact ? "" : "at least ") + std::to_string(size.value); });
    return out + (e.layout == Layout::rows ? " with contiguous rows" : "") + " on " + e.device;
}

bool has_expected_dtype(const Buffer& b, const Expected& e) {
    return std::any_of(e.dtypes.begin(), e.dtypes.end(), [&](Dtype dtype) { return b.dtype == info(dtype).name; });
}

bool has_expected_sizes(const Buffer& b, const Expected& e) {
    if (b.dimensions != static_cast<int>(e.sizes.size())) return false;
    int at = 0;
    for (const Size& size : e.sizes) {
        const std::int64_t found = b.sizes[at++];
        if (size.exact ? found != size.value : found < size.value) return false;
    }
    return true;
}

bool has_expected_strides(const Buffer& b, const Expected& e) {
    std::int64_t dense = 1;
    for (int at = b.dimensions - 1; at >= 0; --at) {
        const std::int64_t size = b.sizes[at], stride = b.strides[at];
        if (size > 1) {  // otherwise the stride is never used
            if (stride < 0) return false;
            const bool row = e.layout == Layout::rows && at == 0;
            if (e.layout != Layout::any && (row ? stride < dense : stride != dense)) return false;
        }
        if (at == 0 || e.layout == Layout::any) continue;
        if (__builtin_mul_overflow(dense, std::max<std::int64_t>(size, 1), &dense)) return false;
    }
    return true;
}

// Whether the end of the last element has an address at all.
bool fits_address_space(const Buffer& b, std::size_t bytes) {
    std::int64_t last = 0;
    for (int at = 0; at < b.dimensions; ++at) {
        std::int64_t step;
        if (b.sizes[at] < 2) continue;
        if (__builtin_mul_overflow(b.sizes[at] - 1, b.strides[at], &step) || __builtin_add_overflow(last, step, &last))
            return false;
    }
    std::int64_t end;
    std::uintptr_t past;
    return !__builtin_add_overflow(last, 1, &last) &&
           !__builtin_mul_overflow(last, static_cast<std::int64_t>(bytes), &end) &&
           !__builtin_add_overflow(b.address, static_cast<std::uintptr_t>(end), &past);
}

bool is_aligned(const Buffer& b, const Expected& e, std::size_t bytes, std::size_t alignment) {
    if (b.address % alignment != 0) return false;
    return e.layout != Layout::rows || b.dimensions != 2 || b.sizes[0] < 2 ||
           static_cast<std::size_t>(b.strides[0]) * bytes % alignment == 0;
}

}  // namespace

Dtype dtype_of(const Buffer& b) {
    for (std::size_t at = 0; at < std::size(DTYPES); ++at)
        if (b.dtype == DTYPES[at].name) return static_cast<Dtype>(at);
    refuse(b.dtype + " is not a known dtype");
}

void* checked(const Buffer& b, const Expected& e) {
    const std::string name = e.name;
    if (b.device != e.device || !has_expected_dtype(b, e) || !has_expected_sizes(b, e) || !has_expected_strides(b, e))
        refuse(name + " must be " + described(e) + ", not " + described(b));
    if (b.address == 0) refuse(name + " is a null pointer");
    const std::size_t bytes = info(dtype_of(b)).bytes, alignment = std::max(bytes, e.alignment);
    if (!is_aligned(b, e, bytes, alignment))
        refuse(name + " must begin" + (e.layout == Layout::rows ? ", and each of its rows," : "") +
               " at a multiple of " + std::to_string(alignment) + " bytes, not " + described(b));
    if (!fits_address_space(b, bytes)) refuse(name + " reaches beyond 64 bits: " + described(b));
    return reinterpret_cast<void*>(b.address);
}

}  // namespace cliperase

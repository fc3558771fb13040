// The emulated instruction of AMX, compared with double precision, with what Intel documents for subnormal numbers and the
// order of the sums and, where the processor has it, bit by bit with the instruction itself.
#define CLIPERASE_ISA amx_instruction_emulated
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#define CLIPERASE_AMX
#define CLIPERASE_AMX_EMULATED
#include "amx_instruction.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "batch.h"
#include "expect.h"

#if defined(CLIPERASE_AMX_BF16)
void multiply_add_by_amx(const std::int32_t* a, const std::int32_t* b, float* c);  // amx_instruction.cpp
#endif

namespace {

constexpr std::size_t N = 16;

// A [16, 16] and B [16, 16] in pairs, and C.
struct Operands {
    std::vector<std::int32_t> a, b;
    std::vector<float> c;

    Operands() : a(N * N), b(N * N), c(N * N) {}

    // Pair k of the first row of A and of the first column of B.
    void set(std::size_t k, double a_first, double a_second, double b_first = 1, double b_second = 1) {
        a[k] = pair(a_first, a_second), b[k * N] = pair(b_first, b_second);
    }
    static std::int32_t pair(double first, double second) {
        return static_cast<std::int32_t>(encode(Dtype::bfloat16, second) << 16 | encode(Dtype::bfloat16, first));
    }
    static double number(std::int32_t pair, int half) {
        return decode(Dtype::bfloat16, static_cast<std::uint32_t>(pair) >> 16 * half & 0xffffu);
    }
};

std::vector<float> multiply_add(Operands with) {
#if defined(CLIPERASE_AMX_BF16)
    std::vector<float> by_amx = with.c;
    const bool here = cliperase::choose_kernels("amx") != nullptr;
    if (here) multiply_add_by_amx(with.a.data(), with.b.data(), by_amx.data());
#endif
    cliperase::amx_instruction_emulated::multiply_add(with.a.data(), with.b.data(), with.c.data());
#if defined(CLIPERASE_AMX_BF16)
    if (here && std::memcmp(by_amx.data(), with.c.data(), N * N * sizeof(float)) != 0)
        fail("the instruction and its emulation give different bits", "amx");
#endif
    return with.c;
}

void expect_first(const char* what, const Operands& with, double expected) {
    expect_within(what, "amx_emulated", multiply_add(with)[0], expected, 0);
}

}  // namespace

void check_amx() {
    context = "";
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    for (const double spread : {0.0, 20.0}) {
        Operands with;
        const auto draw = [&] { return normal(random) * std::exp2(spread * normal(random) / 2); };
        for (std::size_t i = 0; i < N * N; ++i)
            with.a[i] = Operands::pair(draw(), draw()), with.b[i] = Operands::pair(draw(), draw()),
            with.c[i] = static_cast<float>(draw());
        const std::vector<float> found = multiply_add(with);
        for (std::size_t i = 0; i < N; ++i)
            for (std::size_t j = 0; j < N; ++j) {
                double sum = with.c[i * N + j], mass = std::abs(sum);
                for (std::size_t k = 0; k < N; ++k)
                    for (const int half : {0, 1}) {
                        const double product =
                            Operands::number(with.a[i * N + k], half) * Operands::number(with.b[k * N + j], half);
                        sum += product, mass += std::abs(product);
                    }
                expect_within("product of registers", "amx_emulated", found[i * N + j], sum, 1e-6 * mass);
            }
    }
    Operands order;  // the first numbers of pairs, the second ones and C are summed apart
    order.set(0, 1 << 24, -(1 << 24)), order.set(1, 1, 0);
    order.c[0] = 1;
    expect_first("order of the sums", order, 1);
    Operands tie;  // rounds to nearest even
    tie.set(0, 1 << 24, 0), tie.set(1, 3, 0);
    expect_first("rounding", tie, (1 << 24) + 4);
    Operands operand;  // subnormal operands count as 0, in A, B and C
    operand.set(0, 1e-39, 1, 1e30, 1e-39), operand.set(1, 0, 3, 1, std::exp2(-126));
    operand.c[0] = 1e-38f;
    expect_first("subnormal operands", operand, 3 * std::exp2(-126));
    Operands result;  // and so do results
    result.set(0, std::exp2(-100), 0, std::exp2(-30), 1);
    expect_first("subnormal result", result, 0);
}

// From any layout of a checkpoint into panels and back; bad weights are refused whole.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

enum class Layout { kContiguous, kPaddedRows, kTransposed, kInterleavedRows, kEveryOther, kReversedRows };
constexpr Layout kLayouts[] = {Layout::kContiguous,      Layout::kPaddedRows, Layout::kTransposed,
                               Layout::kInterleavedRows, Layout::kEveryOther, Layout::kReversedRows};

// The matrix [N, K] laid out in memory that ends with its last element; the view points to element (0, 0).
struct Source {
  Array memory;
  MatrixView view;

  Source(const Array& matrix_NK, int64_t N, int64_t K, Layout layout)
      : memory(matrix_NK.dtype, 0), view{nullptr, N, K, K, 1, matrix_NK.dtype} {
    int64_t first = 0;
    if (layout == Layout::kPaddedRows) view.row_stride = K + 7;
    if (layout == Layout::kTransposed) view.row_stride = 1, view.column_stride = N;
    if (layout == Layout::kInterleavedRows) view.row_stride = 2 * K, first = K;  // gate_up: the odd rows
    if (layout == Layout::kEveryOther) view.row_stride = 2 * K, view.column_stride = 2, first = 1;
    if (layout == Layout::kReversedRows) view.row_stride = -K, first = (N - 1) * K;
    const int64_t last = first + (N - 1) * std::max<int64_t>(view.row_stride, 0) + (K - 1) * view.column_stride;
    memory = Array(matrix_NK.dtype, last + 1);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k)
        memory.set(first + n * view.row_stride + k * view.column_stride, float(matrix_NK[n * K + k]));
    view.data = memory.data() + first * itemsize_bytes(matrix_NK.dtype);
  }
};

constexpr Activation kSilu{ActivationKind::kSilu, 0, 0};

std::vector<unsigned char> exported(const Bank& bank, int expert, const std::string& name) {
  const BankShape& shape = bank.shape();
  std::vector<unsigned char> bytes(size_t(shape.d_model) * shape.d_ffn * itemsize_bytes(shape.dtype));
  bank.export_matrix(expert, name, bytes.data());
  return bytes;
}

}  // namespace

TEST(pack_round_trip_of_every_layout) {
  const auto pool = make_pool({0, 0, 0});
  const struct {
    int d_model, d_ffn;
  } dims[] = {{1, 1}, {16, 32}, {33, 17}, {50, 47}};
  Random random(1);
  for (DType dtype : kDTypes)
    for (DType source_dtype : kDTypes)
      for (const auto& [D, F] : dims)
        for (Layout layout : kLayouts)
          for (const bool gated : {false, true}) {
            Array gate_FD(source_dtype, F * D), up_FD(source_dtype, F * D), down_DF(source_dtype, D * F);
            for (Array* matrix : {&gate_FD, &up_FD, &down_DF}) random.fill(*matrix, 2.f);
            const Source gate(gate_FD, F, D, layout), up(up_FD, F, D, layout), down(down_DF, D, F, layout);
            Bank bank({2, D, F, gated, false, dtype, kSilu}, kScalar, pool);
            ExpertSource source{};
            if (gated) source.gate = gate.view;
            source.up = up.view;
            source.down = down.view;
            bank.load(1, source);
            const auto check = [&](const char* name, const Array& matrix) {
              Array wanted(dtype, D * F);
              for (int64_t i = 0; i < D * F; ++i) wanted.set(i, float(matrix[i]));
              CHECK(exported(bank, 1, name) == wanted.bytes,
                    std::string(name) + " " + name_of(source_dtype) + " to " + name_of(dtype) + " D " +
                        std::to_string(D) + " F " + std::to_string(F) + " layout " + std::to_string(int(layout)));
            };
            if (gated) check("gate", gate_FD);
            check("up", up_FD);
            check("down", down_DF);
          }
}

// Old checkpoint files begin their data at any byte.
TEST(pack_from_unaligned_memory) {
  constexpr int D = 33, F = 17;
  Random random(2);
  for (DType dtype : kDTypes) {
    const BankShape shape{1, D, F, false, false, dtype, kSilu};
    const ExpertArrays expert = random_expert(shape, random);
    std::vector<unsigned char> moved(expert.up_FD.bytes.size() + 1);
    std::copy(expert.up_FD.bytes.begin(), expert.up_FD.bytes.end(), moved.begin() + 1);
    ExpertSource source = source_of(shape, expert);
    source.up.data = moved.data() + 1;
    Bank bank(shape, kScalar, make_pool({0}));
    bank.load(0, source);
    CHECK(exported(bank, 0, "up") == expert.up_FD.bytes, name_of(dtype));
  }
}

TEST(pack_keeps_biases) {
  Random random(3);
  const BankShape shape{1, 19, 35, true, true, DType::kBF16, kSilu};
  const ExpertArrays expert = random_expert(shape, random);
  Bank bank(shape, kScalar, make_pool({0}));
  bank.load(0, source_of(shape, expert));
  const auto check = [&](const char* name, const Array& bias, int count, int padded) {
    const float* kept = bank.bias(0, name);
    for (int i = 0; i < padded; ++i)
      CHECK(double(kept[i]) == (i < count ? bias[i] : 0.0), std::string(name) + " " + std::to_string(i));
  };
  check("gate_bias", expert.gate_bias_F, 35, 48);
  check("up_bias", expert.up_bias_F, 35, 48);
  check("down_bias", expert.down_bias_D, 19, 32);
}

// The error names the first bad element; the expert that was there before still answers with the same bits.
TEST(pack_refuses_non_finite_weights) {
  const auto pool = make_pool({0, 0});
  for (DType dtype : kDTypes)
    for (const float bad : {NAN, INFINITY, -INFINITY})
      for (const char* name : {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}) {
        const Problem problem({2, 20, 40, true, true, dtype, kSilu}, 5, 2, DType::kF32, 4);
        Bank bank(problem.shape, *isas()[0], pool);
        problem.load_into(bank);
        const Array before = problem.run(bank, DType::kF32);
        Random random(8);
        ExpertArrays expert = random_expert(problem.shape, random);
        Array* const arrays[] = {&expert.gate_FD,     &expert.up_FD,     &expert.down_DF,
                                 &expert.gate_bias_F, &expert.up_bias_F, &expert.down_bias_D};
        const std::string names[] = {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"};
        const size_t which = size_t(std::find(names, names + 6, name) - names);
        arrays[which]->set(which < 3 ? 19 * (which == 2 ? 40 : 20) + 3 : 3, bad);  // row 19: the second panel
        const std::string place = std::string(name) + (which < 3 ? "[19, 3]" : "[3]");
        std::string message = "loaded";
        try {
          bank.load(0, source_of(problem.shape, expert));
        } catch (const std::invalid_argument& error) {
          message = error.what();
        }
        CHECK(message.ends_with(place), message + ", expected " + place);
        CHECK(problem.run(bank, DType::kF32).bytes == before.bytes, place + " left something of the refused expert");
      }
}

// A finite weight that the bank's type cannot hold is refused as well.
TEST(pack_refuses_overflow) {
  const BankShape shape{1, 4, 4, false, false, DType::kF16, kSilu};
  Random random(5);
  const ExpertArrays expert = random_expert(shape, random);
  Array up_FD(DType::kF32, 16);
  up_FD.set(6, 65520.f);  // rounds to 65536
  ExpertSource source = source_of(shape, expert);
  source.up = {up_FD.data(), 4, 4, 4, 1, DType::kF32};
  Bank bank(shape, kScalar, make_pool({0}));
  bool refused = false;
  try {
    bank.load(0, source);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused && !bank.loaded(0), "65520 as f16");
  up_FD.set(6, 65519.f);  // rounds to 65504
  bank.load(0, source);
  CHECK(bank.loaded(0), "65519 as f16");
}

}  // namespace monde::test

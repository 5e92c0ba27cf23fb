// Every kernel this machine can run against loops in double.
#include <cmath>

#include "check.h"
#include "oracle.h"

namespace monde::test {
namespace {

constexpr Activation kSilu{ActivationKind::kSilu, 0, 0}, kRelu{ActivationKind::kRelu, 0, 0};

std::string describe(const Problem& p, const Isa& isa, DType out) {
  return std::string(isa.name) + " weights " + name_of(p.shape.dtype) + " x " + name_of(p.x_TD.dtype) + " out " +
         name_of(out) + (p.shape.gated ? " gated" : " ungated") + (p.shape.has_bias ? " biased" : "") + " activation " +
         std::to_string(int(p.shape.activation.kind)) + " T " + std::to_string(p.T) + " D " +
         std::to_string(p.shape.d_model) + " F " + std::to_string(p.shape.d_ffn);
}

// One problem on every ISA into every type of out.
void check_everywhere(const Problem& problem, const std::shared_ptr<Pool>& pool) {
  std::vector<Expected> wanted;  // without and, where some ISA has them, with bf16 dot products
  for (const bool bf16_dots : {false, true}) wanted.push_back(expected(problem, bf16_dots));
  for (const Isa* isa : isas()) {
    Bank bank(problem.shape, *isa, pool);
    problem.load_into(bank);
    for (DType out : kDTypes)
      check_within(problem, wanted[uses_bf16_dots(*isa, problem.shape.dtype, problem.x_TD.dtype)],
                   problem.run(bank, out), describe(problem, *isa, out));
  }
}

}  // namespace

TEST(forward_every_type) {
  const auto pool = make_pool({0, 0, 1});
  // D and F on both sides of 16 and 32; T of none, of single rows, and of one block and more for some expert.
  const struct {
    int d_model, d_ffn;
  } dims[] = {{1, 1}, {19, 33}, {48, 16}, {33, 50}};
  const int num_tokens[] = {0, 1, 2, 5, 17, 41};
  unsigned seed = 0;
  for (DType dtype : kDTypes)
    for (DType x_dtype : kDTypes)
      for (const bool gated : {false, true})
        for (const bool has_bias : {false, true})
          for (const auto& [d_model, d_ffn] : dims) {
            // Every third T, another third each time: all of them meet all dims within three types.
            for (size_t i = seed % 3; i < std::size(num_tokens); i += 3)
              check_everywhere(Problem({4, d_model, d_ffn, gated, has_bias, dtype, gated ? kSilu : kRelu},
                                       num_tokens[i], 3, x_dtype, seed),
                               pool);
            ++seed;
          }
}

// Experts large enough for down units in slices, and a last unit with fewer panels than the others: any number of
// threads adds up the same.
TEST(forward_in_slices) {
  for (const int d_model : {200, 336}) {
    const Problem problem({9, d_model, 300, true, true, DType::kBF16, kSilu}, 5, 4, DType::kBF16, unsigned(d_model));
    check_everywhere(problem, make_pool({0, 0}));
    for (const Isa* isa : isas()) {
      std::vector<Array> outs;
      for (const std::vector<int>& nodes : {std::vector<int>{0}, {0, 0}, {0, 0, 0, 0, 0}}) {
        Bank bank(problem.shape, *isa, make_pool(nodes));
        problem.load_into(bank);
        outs.push_back(problem.run(bank, DType::kF32));
      }
      for (const Array& out : outs) CHECK(out.bytes == outs[0].bytes, describe(problem, *isa, DType::kF32));
    }
  }
}

TEST(forward_every_activation) {
  const auto pool = make_pool({0, 0});
  for (int kind = 0; kind <= int(ActivationKind::kSwigluSoftcap); ++kind)
    for (const bool gated : {false, true}) {
      if (!gated && ActivationKind(kind) >= ActivationKind::kSwigluClamp) continue;  // these need a gate
      const Activation activation{ActivationKind(kind), 0.4f, 1.7f};                 // a limit that many values reach
      check_everywhere(Problem({3, 21, 37, gated, true, DType::kF32, activation}, 9, 2, DType::kF32, kind), pool);
    }
}

// Many rows for one expert: wide units, and several stretches of activations that each thread gathers for itself, of
// every element type; tiles of AMX along K in cuts.
TEST(forward_many_rows) {
  const auto pool = make_pool({0, 0, 0});
  for (DType dtype : kDTypes)
    check_everywhere(
        Problem({2, 64, 290, true, false, dtype, kSilu}, repetitions(300), 2, DType::kBF16, unsigned(dtype)), pool);
  check_everywhere(Problem({2, 512, 3, false, true, DType::kF32, kRelu}, 600, 1, DType::kF32, 9), pool);
  check_everywhere(Problem({2, 4090, 19, true, true, DType::kBF16, kSilu}, repetitions(240), 1, DType::kBF16, 8), pool);
}

// More routed rows than one chunk of a forward takes.
TEST(forward_many_chunks) {
  const Problem problem({3, 3, 5, true, true, DType::kBF16, kSilu}, 17000, 2, DType::kBF16, 1);
  Bank bank(problem.shape, *isas()[0], make_pool({0, 0}));
  problem.load_into(bank);
  const bool bf16_dots = uses_bf16_dots(*isas()[0], DType::kBF16, DType::kBF16);
  check_within(problem, expected(problem, bf16_dots), problem.run(bank, DType::kF32), "34000 rows");
}

// Routing of every element type and of any stride gives the very same bits.
TEST(forward_routing_layouts) {
  const Problem problem({4, 20, 24, true, true, DType::kF32, kSilu}, 11, 3, DType::kBF16, 5);
  Bank bank(problem.shape, *isas()[0], make_pool({0, 0}));
  problem.load_into(bank);
  const Array wanted = problem.run(bank, DType::kF32);
  const int T = problem.T, K = problem.K;
  for (DType weights_dtype : {DType::kF32, DType::kBF16}) {
    std::vector<int32_t> ids_KT(size_t(T) * K);
    Array weights_KT(weights_dtype, int64_t(T) * K);
    for (int t = 0; t < T; ++t)
      for (int k = 0; k < K; ++k) {
        ids_KT[size_t(k) * T + t] = int32_t(problem.ids_TK[size_t(t) * K + k]);
        weights_KT.set(int64_t(k) * T + t, float(problem.weights_TK[int64_t(t) * K + k]));
      }
    Array out = problem.make_out(DType::kF32);
    ForwardArgs args = problem.args(out);
    args.ids = reinterpret_cast<const unsigned char*>(ids_KT.data());
    args.ids_are_64_bit = false;
    args.weights = weights_KT.data();
    args.weights_dtype = weights_dtype;
    args.ids_row_stride = args.weights_row_stride = 1;
    args.ids_column_stride = args.weights_column_stride = T;
    bank.forward(args);
    CHECK(out.bytes == wanted.bytes, std::string("transposed int32 ids and weights ") + name_of(weights_dtype));
  }
}

// Some experts, then the others on top: of ragged D, with several chunks, and with sums in slices.
TEST(forward_in_two_goes) {
  const auto pool = make_pool({0, 0, 1});
  const Problem problems[] = {
      Problem({5, 19, 33, true, true, DType::kBF16, kSilu}, 9, 3, DType::kBF16, 1),
      Problem({5, 3, 5, true, true, DType::kF32, kSilu}, repetitions(17000), 2, DType::kF32, 2),
      Problem({9, 336, 300, true, false, DType::kBF16, kSilu}, 3, 4, DType::kBF16, 3),
  };
  for (const Problem& problem : problems)
    for (const Isa* isa : isas()) {
      Bank bank(problem.shape, *isa, pool);
      problem.load_into(bank);
      const Expected wanted = expected(problem, uses_bf16_dots(*isa, problem.shape.dtype, problem.x_TD.dtype));
      const int E = problem.shape.num_experts;
      for (int mask = 0; mask < 4; ++mask) {
        std::vector<uint8_t> first_E, rest_E;  // nobody, every other one, the others, everybody
        for (int e = 0; e < E; ++e) {
          first_E.push_back(uint8_t(mask >> e % 2 & 1));
          rest_E.push_back(!first_E.back());
        }
        Array out = problem.make_out(DType::kF32);
        ForwardArgs args = problem.args(out);
        args.is_wanted_E = first_E.data();
        const ForwardCounts first = bank.forward(args);
        args.is_wanted_E = rest_E.data(), args.adds = true;
        const ForwardCounts rest = bank.forward(args);
        check_within(problem, wanted, out, describe(problem, *isa, DType::kF32) + " in two goes");
        args.is_wanted_E = nullptr, args.adds = false;
        const int64_t num_pairs = bank.forward(args).num_pairs;
        CHECK(first.num_pairs + rest.num_pairs == num_pairs, std::to_string(num_pairs));
      }
    }
}

TEST(forward_counts_wanted_pairs) {
  const Problem problem({4, 20, 24, true, false, DType::kF16, kSilu}, 13, 3, DType::kF32, 2);
  Bank bank(problem.shape, *isas()[0], make_pool({0}));
  problem.load_into(bank);
  int64_t pairs = 0;
  std::vector<bool> used(4);
  for (size_t i = 0; i < problem.ids_TK.size(); ++i) {
    const int64_t id = problem.ids_TK[i];
    if (id < 0 || id >= 4 || problem.weights_TK[int64_t(i)] == 0) continue;
    ++pairs;
    used[size_t(id)] = true;
  }
  Array out = problem.make_out(DType::kF32);
  const ForwardCounts counts = bank.forward(problem.args(out));
  CHECK(counts.num_pairs == pairs, std::to_string(counts.num_pairs) + " pairs of " + std::to_string(pairs));
  CHECK(counts.num_experts == std::count(used.begin(), used.end(), true), std::to_string(counts.num_experts));
}

// A NaN in one token's x reaches that token's y, through every activation, and no other token's.
TEST(forward_keeps_nan_in_its_row) {
  const auto pool = make_pool({0, 0});
  for (const Isa* isa : isas())
    for (DType dtype : kDTypes)
      for (int kind = 0; kind <= int(ActivationKind::kSwigluSoftcap); ++kind) {
        const BankShape shape{2, 18, 20, true, false, dtype, {ActivationKind(kind), 1.f, 1.f}};
        Problem problem(shape, 3, 1, DType::kBF16, 3);
        std::fill(problem.ids_TK.begin(), problem.ids_TK.end(), 0);
        for (int t = 0; t < 3; ++t) problem.weights_TK.set(t, 1.f);
        problem.x_TD.set(problem.x_row_stride + 17, NAN);
        Bank bank(shape, *isa, pool);
        problem.load_into(bank);
        const Array y = problem.run(bank, DType::kF32);
        for (int t = 0; t < 3; ++t)
          for (int d = 0; d < 18; ++d)
            CHECK(std::isnan(y[t * problem.out_row_stride + d]) == (t == 1),
                  describe(problem, *isa, DType::kF32) + " token " + std::to_string(t));
      }
}

}  // namespace monde::test

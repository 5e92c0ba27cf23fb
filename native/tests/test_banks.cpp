// Banks that share a pool: answers do not depend on threads or company; memory goes back and comes again.
#include <cstring>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

constexpr Activation kSilu{ActivationKind::kSilu, 0, 0};

std::vector<Problem> some_problems() {
  std::vector<Problem> problems;
  for (unsigned seed = 0; seed < 6; ++seed)
    problems.emplace_back(BankShape{5, 40 + 11 * int(seed), 70, seed % 2 == 0, seed % 3 == 0, kDTypes[seed % 3], kSilu},
                          seed % 2 ? 3 : 40, 3, kDTypes[(seed + 1) % 3], seed);
  return problems;
}

std::vector<unsigned char> bytes_of(const Problem& problem, Bank& bank) { return problem.run(bank, DType::kF32).bytes; }

}  // namespace

TEST(banks_do_not_depend_on_threads) {
  for (const Isa* isa : isas())
    for (const Problem& problem : some_problems()) {
      std::vector<unsigned char> wanted;
      for (const auto& nodes : {std::vector<int>{0}, {0, 0}, {0, 0, 0, 1, 1}, std::vector<int>(17, 0)}) {
        Bank bank(problem.shape, *isa, make_pool(nodes));
        problem.load_into(bank);
        const auto got = bytes_of(problem, bank);
        if (wanted.empty()) wanted = got;
        CHECK(got == wanted, std::string(isa->name) + " on " + std::to_string(nodes.size()) + " threads");
      }
    }
}

TEST(banks_share_a_pool_between_callers) {
  const auto pool = make_pool({0, 0, 1, 1}, 20e-6);
  const std::vector<Problem> problems = some_problems();
  std::vector<std::unique_ptr<Bank>> banks;
  std::vector<std::vector<unsigned char>> wanted;
  for (const Problem& problem : problems) {
    banks.push_back(std::make_unique<Bank>(problem.shape, *isas()[0], pool));
    problem.load_into(*banks.back());
    wanted.push_back(bytes_of(problem, *banks.back()));
  }
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < repetitions(200); ++round)
        for (size_t i = 0; i < problems.size(); ++i) {
          const size_t at = (i + caller * 2) % problems.size();
          CHECK(bytes_of(problems[at], *banks[at]) == wanted[at], "bank " + std::to_string(at));
        }
    });
  // Meanwhile another bank on the same pool loads and releases.
  callers.emplace_back([&] {
    const Problem& problem = problems[0];
    for (int round = 0; round < repetitions(200); ++round) {
      Bank bank(problem.shape, *isas()[0], pool);
      problem.load_into(bank);
      CHECK(bytes_of(problem, bank) == wanted[0], "a bank that comes and goes");
      bank.release(0);
    }
  });
  for (std::thread& caller : callers) caller.join();
}

// Loading or releasing one expert while a forward reads others of the same bank.
TEST(banks_load_beside_a_forward) {
  Problem problem({4, 30, 50, true, true, DType::kBF16, kSilu}, 6, 2, DType::kF32, 1);
  for (int64_t& id : problem.ids_TK) id = id == 2 ? 0 : id;  // expert 2 is the loader's
  Bank bank(problem.shape, *isas()[0], make_pool({0, 0, 0}));
  problem.load_into(bank);
  const auto wanted = bytes_of(problem, bank);
  std::thread loader([&] {
    for (int round = 0; round < repetitions(1000); ++round) {
      bank.release(2);
      bank.load(2, source_of(problem.shape, problem.experts[2]));
    }
  });
  for (int round = 0; round < repetitions(1000); ++round)
    CHECK(bytes_of(problem, bank) == wanted, "beside a load of another expert");
  loader.join();
}

// Two banks with three places for their six experts: who has none is missing, and who takes another's place computes
// as before.
TEST(banks_share_places) {
  const Problem problem({4, 100, 90, true, true, DType::kBF16, kSilu}, 9, 2, DType::kF32, 2);
  const auto pool = make_pool({0, 0});
  Bank whole(problem.shape, *isas()[0], pool);
  problem.load_into(whole);
  const auto wanted = bytes_of(problem, whole);
  const auto places = std::make_shared<Arena>(3 * whole.expert_stride_bytes());
  Bank first(problem.shape, *isas()[0], pool, places), second(problem.shape, *isas()[0], pool, places);
  for (int expert = 0; expert < 3; ++expert) first.place(expert, 2 - expert, false);
  CHECK(first.resident_bytes() == 0, "before anything is loaded");
  problem.load_into(first);
  problem.load_into(second);
  CHECK(bytes_of(problem, first) == wanted, "with all places");
  CHECK(first.resident_bytes() == whole.resident_bytes(), std::to_string(first.resident_bytes()));
  CHECK(!second.loaded(0) && second.bias(0, "up_bias") != nullptr, "biases without a place");
  CHECK(second.resident_bytes() > 0 && second.resident_bytes() < 3 * 4 * (2 * 96 + 112) + 1, "biases alone");
  for (int expert = 0; expert < 3; ++expert) {
    first.place(expert, kNowhere, false);
    std::string missing = "none";
    try {
      bytes_of(problem, first);
    } catch (const std::out_of_range& error) {
      missing = error.what();
    }
    CHECK(missing == "0", "missing " + missing);
    second.place(expert, 2 - expert, true);  // the same bytes
  }
  CHECK(bytes_of(problem, second) == wanted, "in places that others have filled");
  for (const int place : {-2, 3}) {
    bool refused = false;
    try {
      first.place(0, place, true);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, "place " + std::to_string(place));
  }
}

// Experts leave and enter places while a forward reads others of the same bank.
TEST(banks_exchange_beside_a_forward) {
  Problem problem({4, 30, 50, true, true, DType::kBF16, kSilu}, 6, 2, DType::kF32, 1);
  for (int64_t& id : problem.ids_TK) id = id == 2 ? 0 : id;  // expert 2 is the one that moves
  const auto pool = make_pool({0, 0, 0});
  const auto places = std::make_shared<Arena>(4 * 3 * 4096 * 10);
  Bank bank(problem.shape, *isas()[0], pool, places);
  for (int expert = 0; expert < 3; ++expert) bank.place(expert, expert, false);
  problem.load_into(bank);
  const auto wanted = bytes_of(problem, bank);
  std::thread mover([&] {
    for (int round = 0; round < repetitions(1000); ++round) {
      bank.place(2, kNowhere, false);
      std::memcpy(places->data() + (3 + round % 2) * bank.expert_stride_bytes(), places->data(), 4096);
      bank.place(2, 3 + round % 2, true);
    }
  });
  for (int round = 0; round < repetitions(1000); ++round)
    CHECK(bytes_of(problem, bank) == wanted, "beside an exchange of another expert");
  mover.join();
}

TEST(banks_release_and_reload) {
  const Problem problem({4, 100, 90, true, true, DType::kF32, kSilu}, 9, 2, DType::kF32, 2);
  Bank bank(problem.shape, *isas()[0], make_pool({0, 0}));
  CHECK(bank.resident_bytes() == 0, std::to_string(bank.resident_bytes()));
  problem.load_into(bank);
  const int64_t resident_bytes = bank.resident_bytes();
  const auto wanted = bytes_of(problem, bank);
  for (int expert = 0; expert < 3; ++expert) {
    bank.release(expert);
    CHECK(!bank.loaded(expert) && bank.resident_bytes() == resident_bytes / 3 * 2, std::to_string(expert));
    CHECK(bank.bias(expert, "up_bias") == nullptr, "biases stay");
    std::string missing = "none";
    try {
      bytes_of(problem, bank);
    } catch (const std::out_of_range& error) {
      missing = error.what();
    }
    CHECK(missing == std::to_string(expert), "missing " + missing);
    bank.load(expert, source_of(problem.shape, problem.experts[expert]));
    CHECK(bytes_of(problem, bank) == wanted, "after reloading " + std::to_string(expert));
  }
  CHECK(bank.resident_bytes() == resident_bytes, std::to_string(bank.resident_bytes()));
}

// Whole pages inside the range read as zero afterwards; bytes outside and on cut pages stay.
TEST(arena_discards_whole_pages_only) {
  constexpr size_t kPage = 4096, kPages = 8;
  Random random(3);
  for (int round = 0; round < 200; ++round) {
    Arena arena(kPages * kPage);
    std::memset(arena.data(), 7, arena.num_bytes());
    const size_t begin = size_t(random.below(int(kPages * kPage)));
    const size_t end = begin + size_t(random.below(int(kPages * kPage - begin) + 1));
    arena.discard(begin, end - begin);
    for (size_t page = 0; page < kPages; ++page) {
      const unsigned char* at = arena.data() + page * kPage;
      const bool inside = begin <= page * kPage && (page + 1) * kPage <= end;
      CHECK(std::count(at, at + kPage, inside ? 0 : 7) == int(kPage), "page " + std::to_string(page));
    }
    std::memset(arena.data(), 9, arena.num_bytes());  // usable again
  }
  CHECK(Arena(0).data() != nullptr, "an empty arena");
}

}  // namespace monde::test

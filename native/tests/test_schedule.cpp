// Cutting a forward into units, on random shapes.
#include <algorithm>
#include <numeric>

#include "../runtime/pool.h"
#include "../runtime/schedule.h"
#include "arrays.h"
#include "check.h"

namespace monde::test {
namespace {

struct Case {
  ExpertLayout layout;
  std::vector<ExpertGroup> groups;
  std::vector<int> node_of_thread;
  std::string what;
};

Case random_case(Random& random) {
  Case c;
  c.layout = make_layout(1 + random.below(200), 1 + random.below(random.below(2) ? 40 : 3000), true, DType::kBF16);
  for (int g = random.below(20); g > 0; --g) {
    ExpertGroup group{};
    group.num_rows = 1 + random.below(random.below(2) ? 4 : 400);
    c.groups.push_back(group);
  }
  const int num_nodes = 1 + random.below(4);
  for (int node = 0; node < num_nodes; ++node)
    c.node_of_thread.insert(c.node_of_thread.end(), 1 + random.below(16), node);
  c.what = std::to_string(c.groups.size()) + " groups, " + std::to_string(c.layout.num_f_panels) + " panels, " +
           std::to_string(c.node_of_thread.size()) + " threads, " + std::to_string(num_nodes) + " nodes";
  return c;
}

}  // namespace

TEST(schedule_covers_every_panel_once) {
  Random random(1);
  for (int round = 0; round < repetitions(2000); ++round) {
    const Case c = random_case(random);
    const int num_threads = int(c.node_of_thread.size()), num_nodes = c.node_of_thread.back() + 1;
    const int num_groups = int(c.groups.size()), num_panels = c.layout.num_f_panels;
    const int rows_at_once = 32 * (1 + random.below(6));
    int64_t num_rows = 0;
    for (const ExpertGroup& group : c.groups) num_rows += group.num_rows;
    const int64_t most = max_segments(num_groups, num_rows, rows_at_once, num_nodes);
    std::vector<Segment> segments(most);
    std::vector<int> begin(num_threads + 1, -1);
    const int num_segments = schedule_gate_up(c.layout, c.groups.data(), num_groups, rows_at_once,
                                              {num_threads, c.node_of_thread.data()}, segments.data(), begin.data());
    CHECK(num_segments <= most, c.what);
    CHECK(begin[0] == 0 && std::is_sorted(begin.begin(), begin.end()), c.what);

    // By pair of blocks, of which stretches are made, and panel.
    constexpr int kPairRows = 2 * kBlockRows;
    std::vector<int> first_pair(num_groups + 1);
    for (int g = 0; g < num_groups; ++g)
      first_pair[g + 1] = first_pair[g] + (c.groups[g].num_rows + kPairRows - 1) / kPairRows;
    const size_t num_cells = size_t(first_pair[num_groups]) * num_panels;
    std::vector<int> times_covered(num_cells);
    std::vector<double> thread_cost(num_threads), node_cost(num_nodes), node_dearest(num_nodes);
    for (int thread = 0; thread < num_threads; ++thread) {
      const int node = c.node_of_thread[thread];
      const auto [first, last] = std::equal_range(c.node_of_thread.begin(), c.node_of_thread.end(), node);
      const int node_panels_begin = panel_share(num_panels, int(first - c.node_of_thread.begin()), num_threads);
      const int node_panels_end = panel_share(num_panels, int(last - c.node_of_thread.begin()), num_threads);
      for (int unit = begin[thread]; unit < begin[thread + 1]; ++unit) {
        const Segment& s = segment_of(segments.data(), num_segments, unit);
        const int panel = s.panel_begin + (unit - s.first_unit) * s.panels_per_unit;
        const int panel_end = std::min(panel + s.panels_per_unit, s.panel_end);
        CHECK(panel < panel_end, c.what + ": an empty unit");
        CHECK(panel >= node_panels_begin && panel_end <= node_panels_end, c.what + ": a unit of another node's panels");
        const int group_rows = c.groups[s.group].num_rows;
        CHECK(s.row_begin < s.row_end && (s.row_end % kPairRows == 0 || s.row_end == group_rows), c.what);
        for (int row = s.row_begin; row < s.row_end; row += kPairRows)
          for (int p = panel; p < panel_end; ++p)
            ++times_covered[size_t(first_pair[s.group] + row / kPairRows) * num_panels + p];
        thread_cost[thread] += s.unit_cost;
        node_cost[node] += s.unit_cost;
        node_dearest[node] = std::max<double>(node_dearest[node], s.unit_cost);
      }
    }
    CHECK(std::all_of(times_covered.begin(), times_covered.end(), [](int times) { return times == 1; }), c.what);
    // A share begins at most one unit early and never ends late.
    for (int thread = 0; thread < num_threads; ++thread) {
      const int node = c.node_of_thread[thread];
      const auto threads_of_node = std::count(c.node_of_thread.begin(), c.node_of_thread.end(), node);
      CHECK(thread_cost[thread] <= (node_cost[node] / threads_of_node + node_dearest[node]) * (1 + 1e-6),
            c.what + ": thread " + std::to_string(thread) + " has " + std::to_string(thread_cost[thread]) + " of " +
                std::to_string(node_cost[node]));
    }
  }
}

TEST(split_evenly_is_even) {
  for (int num_units = 0; num_units < 50; ++num_units)
    for (int parts = 1; parts < 20; ++parts) {
      std::vector<int> begin(parts + 1);
      split_evenly(num_units, parts, begin.data());
      const std::string what = std::to_string(num_units) + " in " + std::to_string(parts);
      CHECK(begin[0] == 0 && begin[parts] == num_units, what);
      for (int i = 0; i < parts; ++i) {
        const int size = begin[i + 1] - begin[i];
        CHECK(size == num_units / parts || size == (num_units + parts - 1) / parts, what);
      }
    }
  int begin[3];
  split_evenly(2147483647, 2, begin);
  CHECK(begin[1] == 1073741823, "large counts do not overflow");
}

TEST(down_units_are_never_empty_and_slices_know_no_threads) {
  Random random(2);
  for (int round = 0; round < 1000; ++round) {
    const ExpertLayout layout = make_layout(1 + random.below(8000), 64, true, DType::kF32);
    const int tokens = 1 + random.below(300), groups = random.below(64);
    const int rows = groups * (1 + random.below(random.below(2) ? 4 : 100)), threads = 1 + random.below(64);
    const DownUnits cut = cut_down(layout, tokens, rows, groups, threads);
    const std::string what = std::to_string(cut.panels_per_unit) + " panels, " + std::to_string(cut.num_slices) +
                             " slices of " + std::to_string(groups) + " groups";
    CHECK(cut.panels_per_unit >= 1 && cut.panels_per_unit <= 12, what);
    CHECK(cut.num_slices >= 1 && cut.num_slices <= std::max(1, groups), what);
    CHECK(cut.num_slices == cut_down(layout, tokens, rows, groups, 1).num_slices, what);
  }
}

// 128 panels of D: rounds of the threads are even, and units as wide as that allows.
TEST(down_units_of_many_rows_keep_all_threads_busy) {
  const ExpertLayout layout = make_layout(2048, 768, true, DType::kBF16);
  const struct {
    int threads, panels;
  } wanted[] = {{15, 9}, {16, 8}, {32, 4}, {2, 8}};
  for (const auto& [threads, panels] : wanted)
    CHECK(cut_down(layout, 1024, 8192, 64, threads).panels_per_unit == panels, std::to_string(threads) + " threads");
}

}  // namespace monde::test

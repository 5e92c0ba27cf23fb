#include "schedule.h"

#include <algorithm>
#include <climits>

namespace monde {
namespace {

// Rows up to which reading an expert's weights takes longer than multiplying by them, roughly, on every ISA measured.
constexpr int kMemoryBoundRows = 4;

// Units per thread below which one slow thread would be felt at the end of a phase.
constexpr int kUnitsPerThread = 8;

// Column panels of a down unit: 200 KB of an expert with F = 768. On two cores of Zen 5, units of one panel read 10%
// slower for one token and 16% slower for 16, as its prefetchers begin anew with every expert.
constexpr int kMaxDownPanels = 8;

// Weights that a slice of the widest unit reads, if experts are that small: microseconds of a core's memory bandwidth.
constexpr size_t kDownUnitBytes = size_t(64) << 10;

// Of units of many rows, whose sums for all tokens are of so many bytes at most: they pass through L2 with the rows.
constexpr int kMaxWidePanels = 12;
constexpr size_t kWideSumsBytes = size_t(5) << 18;

// In half panels of products: what a unit's reading of all hidden rows takes, and what a panel without a neighbour does
// on top, which has activations to itself that two share.
constexpr int kHiddenReadHalves = 4, kLonelyHalves = 1;

// Sums of slices wait in the caches for the last one of their panel.
constexpr size_t kMaxSumsBytes = size_t(2) << 20;

// A unit reads its activation rows once for all its panels: wide units save that traffic, narrow ones balance better.
int panels_per_unit(int num_rows, int64_t total_panels, int num_threads) {
  const int by_reuse = num_rows <= kBlockRows ? 1 : num_rows <= 2 * kBlockRows ? 2 : num_rows <= 4 * kBlockRows ? 4 : 8;
  const int64_t by_balance = std::max<int64_t>(1, total_panels / (int64_t(kUnitsPerThread) * num_threads));
  return int(std::min<int64_t>(by_reuse, by_balance));
}

// Panels of units that all cost the same, of which the threads take one each, round by round: as many as make it quick.
int widest_in_time(int num_panels, int num_tokens, int num_threads) {
  const size_t by_sums = kWideSumsBytes / (size_t(num_tokens) * kLanes * sizeof(float));
  int best = 2, best_cost = INT_MAX;
  for (int panels = 2; panels <= std::clamp(int(by_sums), 2, kMaxWidePanels); ++panels) {
    const int num_units = (num_panels + panels - 1) / panels, rounds = (num_units + num_threads - 1) / num_threads;
    const int cost = rounds * (2 * panels + panels % 2 * kLonelyHalves + kHiddenReadHalves);
    if (cost < best_cost) best = panels, best_cost = cost;
  }
  return best;
}

}  // namespace

int panel_share(int num_panels, int thread, int num_threads) { return int(int64_t(num_panels) * thread / num_threads); }

int64_t max_segments(int num_groups, int64_t num_rows, int rows_at_once, int num_nodes) {
  return (num_groups + num_rows / rows_at_once) * num_nodes;
}

int schedule_gate_up(const ExpertLayout& layout, const ExpertGroup* groups, int num_groups, int rows_at_once,
                     const ThreadMap& threads, Segment* segments, int* range_begin) {
  int num_segments = 0, unit = 0, node_begin = 0;
  while (node_begin < threads.num_threads) {
    int node_end = node_begin;
    while (node_end < threads.num_threads && threads.node_of_thread[node_end] == threads.node_of_thread[node_begin])
      ++node_end;
    const int panel_begin = panel_share(layout.num_f_panels, node_begin, threads.num_threads);
    const int panel_end = panel_share(layout.num_f_panels, node_end, threads.num_threads);
    const int first_segment = num_segments;
    double node_cost = 0;
    const int num_panels = panel_end - panel_begin;
    int64_t num_stretches = 0;
    for (int g = 0; g < num_groups; ++g) num_stretches += (groups[g].num_rows + rows_at_once - 1) / rows_at_once;
    for (int g = 0; g < num_groups && num_panels > 0; ++g) {
      const int group_begin = std::max(panel_begin, groups[g].first_panel), group_panels = panel_end - group_begin;
      if (group_panels <= 0) continue;
      for (int row = 0; row < groups[g].num_rows; row += rows_at_once) {
        const int row_end = std::min(row + rows_at_once, groups[g].num_rows), num_rows = row_end - row;
        Segment& segment = segments[num_segments++];
        segment = {unit, g, row, row_end, group_begin, panel_end, 0, 0};
        segment.panels_per_unit = panels_per_unit(num_rows, num_stretches * num_panels, node_end - node_begin);
        const int units = (group_panels + segment.panels_per_unit - 1) / segment.panels_per_unit;
        segment.unit_cost = float(segment.panels_per_unit) * float(std::max(num_rows, kMemoryBoundRows));
        node_cost += double(units) * segment.unit_cost;
        unit += units;
      }
    }
    // Walk the node's units and hand each thread the next equal share of cost.
    int thread = node_begin;
    double cost = 0;
    range_begin[thread++] = first_segment < num_segments ? segments[first_segment].first_unit : unit;
    for (int s = first_segment; s < num_segments; ++s) {
      const int units_end = s + 1 < num_segments ? segments[s + 1].first_unit : unit;
      const double segment_cost = double(units_end - segments[s].first_unit) * segments[s].unit_cost;
      while (thread < node_end) {
        const double wanted = node_cost * (thread - node_begin) / (node_end - node_begin);
        if (wanted >= cost + segment_cost) break;
        range_begin[thread++] = segments[s].first_unit + int((wanted - cost) / segments[s].unit_cost);
      }
      cost += segment_cost;
    }
    while (thread < node_end) range_begin[thread++] = unit;
    node_begin = node_end;
  }
  range_begin[threads.num_threads] = unit;
  return num_segments;
}

const Segment& segment_of(const Segment* segments, int num_segments, int unit) {
  const Segment* after = std::upper_bound(segments, segments + num_segments, unit,
                                          [](int u, const Segment& s) { return u < s.first_unit; });
  return after[-1];
}

DownUnits cut_down(const ExpertLayout& layout, int num_tokens, int num_rows, int num_groups, int num_threads) {
  const int D = layout.num_d_panels;
  if (num_rows > kMemoryBoundRows * num_groups) return {widest_in_time(D, num_tokens, num_threads), 1};
  const size_t widest_bytes = std::min(D, kMaxDownPanels) * layout.down_panel_bytes;
  const size_t by_bytes = (num_groups * widest_bytes + kDownUnitBytes - 1) / kDownUnitBytes;
  const size_t by_sums = kMaxSumsBytes / (size_t(std::max(1, num_tokens)) * D * kLanes * sizeof(float));
  const int num_slices = int(std::max<size_t>(1, std::min({size_t(num_groups), by_bytes, by_sums})));
  const int64_t by_balance = int64_t(D) * num_slices / (2 * kUnitsPerThread * num_threads);
  return {int(std::clamp<int64_t>(by_balance, 1, kMaxDownPanels)), num_slices};
}

}  // namespace monde

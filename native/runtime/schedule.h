// Cutting a forward into units and dealing them to threads, balanced by cost. Pure: no threads, no weights.
#pragma once
#include "../kernels/tasks.h"

namespace monde {

// A run of equally expensive units: rows [row_begin, row_end) of one group by panels [panel_begin, panel_end),
// `panels_per_unit` at a time.
struct Segment {
  int first_unit;
  int group;
  int row_begin, row_end;
  int panel_begin, panel_end;
  int panels_per_unit;
  float unit_cost;
};

struct ThreadMap {
  int num_threads;
  const int* node_of_thread;  // ascending
};

// Panels of `num_panels` that belong to thread range [begin, end) of num_threads: the NUMA share of a matrix.
int panel_share(int num_panels, int thread, int num_threads);

// Gate-up units of every group, NUMA node by node and stretch by stretch of `rows_at_once` rows: a thread keeps a
// stretch in its cache while it goes through the panels. Returns the number of segments, at most max_segments(), and
// sets range_begin[num_threads + 1].
int schedule_gate_up(const ExpertLayout& layout, const ExpertGroup* groups, int num_groups, int rows_at_once,
                     const ThreadMap& threads, Segment* segments, int* range_begin);
int64_t max_segments(int num_groups, int64_t num_rows, int rows_at_once, int num_nodes);

// Which segment holds `unit`.
const Segment& segment_of(const Segment* segments, int num_segments, int unit);

// Column panels a down unit takes. Every unit reads all hidden rows once, so wide units save traffic when rows are
// many.
int down_panels_per_unit(const ExpertLayout& layout, int num_rows, int num_groups, int num_threads);

// Slices of the groups that down units of one panel are cut into, so that the last unit of a step is a short one.
// Depends on shapes alone: sums are added in the same order on any number of threads.
int down_slices(const ExpertLayout& layout, int num_tokens, int num_groups);

}  // namespace monde

// Python's view of the runtime. No arithmetic here: arguments become records, errors become exceptions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../runtime/dense.h"
#include "../runtime/doorbell.h"
#include "../runtime/probe.h"
#include "../runtime/submit.h"
#include "../runtime/timeline.h"

namespace nb = nanobind;
using namespace monde;

namespace {

// hostcompute.arrays.HostArray as (address, shape, strides, dtype name).
using Array = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, std::string>;

unsigned char* address(const Array& array) { return reinterpret_cast<unsigned char*>(std::get<0>(array)); }
int64_t extent(const Array& array, int axis) { return std::get<1>(array).at(axis); }
int64_t stride(const Array& array, int axis) { return std::get<2>(array).at(axis); }

DType dtype(const std::string& name) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  if (name == "f16") return DType::kF16;
  throw std::invalid_argument("element type: expected f32, bf16 or f16, got " + name);
}

DType dtype(const Array& array) { return dtype(std::get<3>(array)); }

const Isa& isa_named(const std::string& name) {
  const Isa* found[kMaxIsas];
  const int count = available_isas(found);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (name == found[i]->name) return *found[i];
    names += (i ? ", " : "") + std::string(found[i]->name);
  }
  throw std::invalid_argument("ISA " + name + " is not one this machine can run; it has " + names);
}

ActivationKind activation_kind(const std::string& name) {
  const struct {
    const char* name;
    ActivationKind kind;
  } kinds[] = {{"silu", ActivationKind::kSilu},
               {"gelu_tanh", ActivationKind::kGeluTanh},
               {"gelu_erf", ActivationKind::kGeluErf},
               {"relu", ActivationKind::kRelu},
               {"relu2", ActivationKind::kRelu2},
               {"swiglu_clamp", ActivationKind::kSwigluClamp},
               {"swiglu_alpha", ActivationKind::kSwigluAlpha},
               {"swiglu_post_clamp", ActivationKind::kSwigluPostClamp},
               {"swiglu_softcap", ActivationKind::kSwigluSoftcap}};
  for (const auto& entry : kinds)
    if (name == entry.name) return entry.kind;
  throw std::invalid_argument("activation: unknown kind " + name);
}

MatrixView view(const std::optional<Array>& array) {
  if (!array) return {};
  const bool is_vector = std::get<1>(*array).size() == 1;
  if (is_vector) return {address(*array), 1, extent(*array, 0), 0, stride(*array, 0), dtype(*array)};
  return {address(*array), extent(*array, 0), extent(*array, 1), stride(*array, 0), stride(*array, 1), dtype(*array)};
}

ForwardArgs forward_args(const Array& x, const Array& ids, const Array& weights, const Array& out) {
  for (const Array* array : {&x, &out})
    if (extent(*array, 0) > 0 && stride(*array, 1) != 1 && extent(*array, 1) > 1)
      throw std::invalid_argument(
          "[forward] x and out: expected unit stride in the last dimension; make them contiguous");
  ForwardArgs args{};
  args.x = address(x);
  args.x_dtype = dtype(x);
  args.num_tokens = extent(x, 0);
  args.x_row_stride = stride(x, 0);
  args.ids = address(ids);
  args.ids_are_64_bit = std::get<3>(ids) == "i64";
  args.num_topk = extent(ids, 1);
  args.ids_row_stride = stride(ids, 0);
  args.ids_column_stride = stride(ids, 1);
  args.weights = address(weights);
  args.weights_dtype = dtype(weights);
  args.weights_row_stride = stride(weights, 0);
  args.weights_column_stride = stride(weights, 1);
  args.out = address(out);
  args.out_dtype = dtype(out);
  args.out_row_stride = stride(out, 0);
  return args;
}

std::vector<std::string> available_isa_names() {
  const Isa* found[kMaxIsas];
  std::vector<std::string> names;
  const int count = available_isas(found);
  for (int i = 0; i < count; ++i) names.emplace_back(found[i]->name);
  return names;
}

// The constants of ring:: by name, for the kernels that ring.
nb::dict ring_layout() {
  nb::dict layout;
  layout["LAYER_SHIFT"] = ring::kLayerShift;
  layout["TOKENS_SHIFT"] = ring::kTokensShift;
  layout["LATER_SHIFT"] = ring::kLaterShift;
  layout["TOPK_SHIFT"] = ring::kTopkShift;
  layout["WORK_SHIFT"] = ring::kWorkShift;
  layout["FAILED_SHIFT"] = ring::kFailedShift;
  layout["OWING_SHIFT"] = ring::kOwingShift;
  layout["MAX_LAYERS"] = ring::kMaxLayers;
  layout["MAX_TOKENS"] = ring::kMaxTokens;
  layout["MAX_TOPK"] = ring::kMaxTopk;
  return layout;
}

nb::dict expert_layout(int d_model, int d_ffn, bool gated, const std::string& type) {
  const ExpertLayout from = make_layout(d_model, d_ffn, gated, dtype(type));
  nb::dict layout;
  layout["d_pad_k"] = from.d_pad_k;
  layout["f_pad_k"] = from.f_pad_k;
  layout["num_f_panels"] = from.num_f_panels;
  layout["num_d_panels"] = from.num_d_panels;
  layout["k_group"] = from.k_group;
  layout["in_panel_bytes"] = from.in_panel_bytes;
  layout["in_unit_bytes"] = from.in_unit_bytes;
  layout["down_panel_bytes"] = from.down_panel_bytes;
  layout["down_offset_bytes"] = from.down_offset_bytes;
  layout["weight_bytes"] = from.weight_bytes;
  return layout;
}

nb::tuple range_of(const Arena& arena) {
  return nb::make_tuple(reinterpret_cast<uintptr_t>(arena.data()), arena.num_bytes());
}

nb::tuple counts_tuple(const ForwardCounts& counts) {
  return nb::make_tuple(counts.num_pairs, counts.num_experts, counts.weight_bytes);
}

}  // namespace

NB_MODULE(_native, m) {
  // Threads may outlive the interpreter's teardown order; a leak report there tells users nothing.
  nb::set_leak_warnings(false);

  m.def("available_isas", &available_isa_names, "ISAs this machine can run, best first.");
  m.def("expert_layout", &expert_layout, "ExpertLayout of one expert, by field.");
  m.def("ring_layout", &ring_layout, "Bits of the words that a GPU rings with and is answered by.");

  nb::class_<Pool>(m, "Pool")
      .def(nb::init<std::vector<int>, std::vector<int>, double>(), nb::arg("cpus"), nb::arg("nodes"), nb::arg("spin_s"))
      .def_prop_ro("num_threads", &Pool::num_threads)
      .def_prop_ro("num_nodes", &Pool::num_nodes);

  nb::class_<Pending>(m, "Pending")
      .def("done", &Pending::done)
      .def("wait_for", &Pending::wait_for, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("busy_s", &Pending::busy_s)
      .def("wait", [](const Pending& pending) {
        ForwardCounts counts;
        {
          nb::gil_scoped_release release;
          counts = pending.wait();
        }
        return counts_tuple(counts);
      });

  nb::class_<Arena>(m, "Arena").def(nb::init<size_t>(), nb::arg("num_bytes")).def_prop_ro("memory_range", &range_of);

  nb::class_<Bank>(m, "Bank")
      .def(
          "__init__",
          [](Bank* self, int num_experts, int d_model, int d_ffn, bool gated, bool has_bias, const std::string& type,
             const std::string& activation, float limit, float alpha, const std::string& isa,
             std::shared_ptr<Pool> pool, std::shared_ptr<Arena> places) {
            const BankShape shape{
                num_experts, d_model, d_ffn, gated, has_bias, dtype(type), {activation_kind(activation), limit, alpha}};
            new (self) Bank(shape, isa_named(isa), std::move(pool), std::move(places));
          },
          nb::arg("num_experts"), nb::arg("d_model"), nb::arg("d_ffn"), nb::arg("gated"), nb::arg("has_bias"),
          nb::arg("dtype"), nb::arg("activation"), nb::arg("limit"), nb::arg("alpha"), nb::arg("isa"), nb::arg("pool"),
          nb::arg("places").none())
      .def(
          "load",
          [](Bank& bank, int expert, const std::optional<Array>& gate, const Array& up, const Array& down,
             const std::optional<Array>& gate_bias, const std::optional<Array>& up_bias,
             const std::optional<Array>& down_bias) {
            const ExpertSource source{view(gate),      view(up),      view(down),
                                      view(gate_bias), view(up_bias), view(down_bias)};
            nb::gil_scoped_release release;
            bank.load(expert, source);
          },
          nb::arg("expert"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"), nb::arg("gate_bias").none(),
          nb::arg("up_bias").none(), nb::arg("down_bias").none())
      .def("release", &Bank::release)
      .def("place", &Bank::place, nb::arg("expert"), nb::arg("place"), nb::arg("is_filled"))
      .def("export_matrix",
           [](const Bank& bank, int expert, const std::string& name, uintptr_t to) {
             nb::gil_scoped_release release;
             bank.export_matrix(expert, name, reinterpret_cast<unsigned char*>(to));
           })
      .def("bias_address", [](const Bank& bank, int expert,
                              const std::string& name) { return reinterpret_cast<uintptr_t>(bank.bias(expert, name)); })
      .def("forward",
           [](Bank& bank, const Array& x, const Array& ids, const Array& weights, const Array& out) {
             const ForwardArgs args = forward_args(x, ids, weights, out);
             ForwardCounts counts;
             {
               nb::gil_scoped_release release;
               counts = bank.forward(args);
             }
             return counts_tuple(counts);
           })
      .def_prop_ro("resident_bytes", &Bank::resident_bytes)
      .def_prop_ro("expert_stride_bytes", &Bank::expert_stride_bytes)
      .def_prop_ro("timeline_id", [](const Bank& bank) { return reinterpret_cast<uintptr_t>(&bank); })
      .def_prop_ro("memory_range", [](const Bank& bank) { return range_of(bank.arena()); });

  nb::class_<Doorbell>(m, "Doorbell")
      .def(
          "__init__",
          [](Doorbell* self, nb::handle, std::vector<std::shared_ptr<Bank>> banks, std::shared_ptr<Pool> pool,
             uintptr_t answered, uintptr_t rung, uintptr_t x, uintptr_t ids, uintptr_t weights, uintptr_t out,
             uintptr_t cut, uintptr_t box_bytes, const std::string& x_dtype, double deadline_s) {
            const Mailbox mailbox{answered, rung, x, ids, weights, out, cut, box_bytes, dtype(x_dtype)};
            new (self) Doorbell(std::move(banks), std::move(pool), mailbox, deadline_s);
          },
          nb::arg("memory").none(), nb::arg("banks"), nb::arg("pool"), nb::arg("answered"), nb::arg("rung"),
          nb::arg("x"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"), nb::arg("cut"), nb::arg("box_bytes"),
          nb::arg("x_dtype"), nb::arg("deadline_s"), nb::keep_alive<1, 2>())
      .def("expect", &Doorbell::expect)
      .def("reset", &Doorbell::reset, nb::call_guard<nb::gil_scoped_release>())
      .def("reset_totals", &Doorbell::reset_totals)
      .def_prop_ro("error", &Doorbell::error)
      .def_prop_ro("totals", [](const Doorbell& doorbell) {
        const DoorbellTotals totals = doorbell.totals();
        return nb::make_tuple(totals.num_rings, totals.num_pairs, totals.weight_bytes, totals.busy_s, totals.later_s);
      });

  m.def(
      "submit",
      [](std::shared_ptr<Bank> bank, const Array& x, const Array& ids, const Array& weights, const Array& out,
         int cut_expert, int cut_panel, uintptr_t is_wanted_E, bool adds) {
        ForwardArgs args = forward_args(x, ids, weights, out);
        args.cut_expert = cut_expert, args.cut_panel = cut_panel;
        args.is_wanted_E = reinterpret_cast<const uint8_t*>(is_wanted_E), args.adds = adds;
        nb::gil_scoped_release release;
        return submit_queue().submit(std::move(bank), args);
      },
      nb::arg("bank"), nb::arg("x"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
      nb::arg("cut_expert") = kAllExperts, nb::arg("cut_panel") = 0, nb::arg("is_wanted_E") = 0,
      nb::arg("adds") = false, "Starts a forward; the arrays must stay alive and unchanged until wait().");

  // Addresses and row strides of bf16 matrices that the caller has checked; x and out [tokens, ...], weights [N, K].
  m.def("dense",
        [](Pool& pool, const std::string& isa, uintptr_t x, int64_t x_stride, uintptr_t weights, int64_t weights_stride,
           uintptr_t bias, uintptr_t out, int64_t out_stride, int num_tokens, int num_inputs, int num_outputs) {
          const DenseArgs args{reinterpret_cast<const uint16_t*>(x),
                               ptrdiff_t(x_stride),
                               reinterpret_cast<const uint16_t*>(weights),
                               ptrdiff_t(weights_stride),
                               reinterpret_cast<const uint16_t*>(bias),
                               reinterpret_cast<uint16_t*>(out),
                               ptrdiff_t(out_stride),
                               num_tokens,
                               num_inputs,
                               num_outputs};
          const Isa& chosen = isa_named(isa);
          nb::gil_scoped_release release;
          dense(pool, chosen, args);
        });
  m.attr("MAX_DENSE_TOKENS") = kMaxDenseTokens;

  m.def("timeline_start", &timeline::start);
  // ([(name, start_ns, end_ns, bank, thread, num_tokens, num_pairs, weight_bytes, num_units)], num_dropped)
  m.def("timeline_stop", [] {
    const timeline::Recorded recorded = timeline::stop();
    nb::list spans;
    for (const timeline::Span& span : recorded.spans)
      spans.append(nb::make_tuple(span.name, span.start_ns, span.end_ns, span.bank, span.thread, span.num_tokens,
                                  span.num_pairs, span.weight_bytes, span.num_units));
    return nb::make_tuple(spans, recorded.num_dropped);
  });

  m.def(
      "read_bytes_per_s",
      [](Pool& pool, const std::string& isa, size_t num_bytes, bool huge_pages, int repeats) {
        return read_bytes_per_s(pool, isa_named(isa), num_bytes, huge_pages, repeats);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "read_bytes_per_s_of",
      [](Pool& pool, const std::string& isa, uintptr_t data, size_t num_bytes, int repeats) {
        return read_bytes_per_s_of(pool, isa_named(isa), reinterpret_cast<const unsigned char*>(data), num_bytes,
                                   repeats);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "peak_flops_per_s", [](Pool& pool, const std::string& isa) { return peak_flops_per_s(pool, isa_named(isa)); },
      nb::call_guard<nb::gil_scoped_release>());
}

// Python's view of the engine: checks sizes, releases the GIL, and leaves the rest to the C++ below.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "bandwidth.h"
#include "bind_ops.h"
#include "bind_parts.h"
#include "bind_sequence.h"
#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hotcold;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

void require_bytes(const Bytes& data, Type type, int rows, int cols, const std::string& what) {
  const size_t expected = gguf_row_bytes(type, cols) * rows;
  require(data.size() == expected, what + ": got " + std::to_string(data.size()) + " bytes, expected " + std::to_string(expected));
  require(!is_quantized(type) || cols % kBlock == 0, what + ": quantized rows must be a multiple of 32 wide");
}

std::vector<float> to_vector(const Floats& a, size_t expected, const std::string& what) {
  require(a.size() == expected, what + ": got " + std::to_string(a.size()) + " values, expected " + std::to_string(expected));
  return {a.data(), a.data() + a.size()};
}

void check(const Config& c, int threads) {
  require(c.n_layers > 0 && c.d_model > 0 && c.d_ff > 0 && c.n_vocab > 0, "sizes must be positive");
  require(c.n_kv_heads > 0 && c.n_heads % c.n_kv_heads == 0, "heads must be a multiple of key-value heads");
  require(c.n_heads / c.n_kv_heads <= kMaxGroup, "at most 128 query heads per key-value head");
  require(c.head_dim % kLanes == 0 && c.head_dim <= 512, "head_dim must be a multiple of 16, at most 512");
  require(c.d_model <= 1 << 16 && c.d_ff <= 1 << 20, "d_model or d_ff too large");
  require(c.rule.value >= Value::Gate && c.rule.value <= Value::Gelu && c.rule.score >= Score::Always &&
              c.rule.score <= Score::GateAndUp, "no such firing rule");
  require(c.rule.can_be_zero() || c.mode == Mode::Dense, "SiLU and GELU models run in dense mode only");
  require(c.gated || !c.rule.clips_up(), "dReLU needs a gate");
  require(threads >= 1 && threads <= 256, "1 to 256 threads");
}

Layer& layer_of(Model& m, int l) {
  require(l >= 0 && l < m.config.n_layers, "no such layer");
  return m.layers[l];
}

Panel* panel_slot(Model& m, int l, const std::string& slot) {
  if (slot == "embedding") return &m.embedding;
  if (slot == "head") return &m.head;
  if (slot == "positions") return &m.positions;
  Layer& y = layer_of(m, l);
  if (slot == "q") return &y.q;
  if (slot == "k") return &y.k;
  if (slot == "v") return &y.v;
  if (slot == "o") return &y.o;
  if (slot == "gate") return &y.gate;
  if (slot == "up") return &y.up;
  if (slot == "down") return &y.down;
  if (slot == "fc1") return &y.fc1;
  if (slot == "fc2") return &y.fc2;
  throw std::invalid_argument("no panel '" + slot + "'");
}

void set_panel(Model& m, int l, const std::string& slot, int type, Bytes data, int rows, int cols, std::optional<Ints> order) {
  Panel* panel = panel_slot(m, l, slot);
  require_bytes(data, Type(type), rows, cols, slot);
  require(padded(cols) <= 1 << 16, slot + ": rows wider than 65536");
  if (order) {
    require(int(order->size()) == rows, slot + ": one source row per row");
    for (size_t i = 0; i < order->size(); ++i) require(order->data()[i] >= 0 && order->data()[i] < rows, slot + ": row order out of range");
  }
  nb::gil_scoped_release release;
  *panel = m.add_panel(Type(type), data.data(), rows, cols, order ? order->data() : nullptr);
}

Site site_of(const std::string& name) {
  for (int i = 0; i < kSites; ++i)
    if (name == kSiteNames[i]) return Site(i);
  throw std::invalid_argument("no site '" + name + "'");
}

int site_width(const Config& c, Site site) {
  if (site == Site::O) return c.n_heads * c.head_dim;
  return site == Site::Down ? c.d_ff : c.d_model;
}

// Outputs of the matrices that a mode reads by input. Beside the gates of exact mode, rows of neurons are read by neuron.
std::vector<int> site_outputs(const Config& c, Site site) {
  if (site == Site::Qkv) return {c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim};
  if (site == Site::O) return {c.d_model};
  require(c.mode == Mode::Dense || (c.mode == Mode::Exact && site == Site::GateUp), "held by neuron in this mode");
  if (site == Site::Down) return {c.d_model};
  return std::vector<int>(c.mode == Mode::Dense && c.gated ? 2 : 1, c.d_ff);
}

// Transposed matrices [inputs, outputs] of a site.
void set_input_rows(Model& m, int l, const std::string& slot, std::vector<int> types, std::vector<Bytes> data) {
  const Site site = site_of(slot);
  const std::vector<int> outputs = site_outputs(m.config, site);
  const int inputs = site_width(m.config, site);
  require(types.size() == outputs.size() && data.size() == outputs.size(), slot + ": wrong number of matrices");
  std::vector<InputPart> parts;
  for (size_t i = 0; i < outputs.size(); ++i) {
    require_bytes(data[i], Type(types[i]), inputs, outputs[i], slot);
    parts.push_back({Type(types[i]), data[i].data(), outputs[i]});
  }
  Layer& layer = layer_of(m, l);
  nb::gil_scoped_release release;
  layer.site(site).rows = m.add_input_rows(inputs, parts);
}

// From which size on the inputs of a site count.
void set_least_inputs(Model& m, int l, const std::string& slot, Floats least) {
  const Site site = site_of(slot);
  layer_of(m, l).site(site).least = to_vector(least, site_width(m.config, site), slot);
}

// The place of a vector and how many values belong there.
struct VectorSlot {
  std::vector<float>* values;
  int size;
};

VectorSlot vector_slot(Model& m, int l, const std::string& slot) {
  const int d = m.config.d_model, dim = m.config.head_dim, q = m.config.n_heads * dim, kv = m.config.n_kv_heads * dim;
  if (slot == "output_norm") return {&m.output_norm.weight, d};
  if (slot == "output_norm_bias") return {&m.output_norm.bias, d};
  Layer& y = layer_of(m, l);
  if (slot == "attn_norm") return {&y.attn_norm.weight, d};
  if (slot == "attn_norm_bias") return {&y.attn_norm.bias, d};
  if (slot == "ffn_norm") return {&y.ffn_norm.weight, d};
  if (slot == "ffn_norm_bias") return {&y.ffn_norm.bias, d};
  if (slot == "q_bias") return {&y.q_bias, q};
  if (slot == "k_bias") return {&y.k_bias, kv};
  if (slot == "v_bias") return {&y.v_bias, kv};
  if (slot == "o_bias") return {&y.o_bias, d};
  if (slot == "q_norm") return {&y.q_norm, dim};
  if (slot == "k_norm") return {&y.k_norm, dim};
  if (slot == "gate_bias") return {&y.gate_bias, m.config.d_ff};
  if (slot == "fc2_bias") return {&y.fc2_bias, m.config.d_ff};
  if (slot == "down_bias") return {&y.down_bias, d};
  throw std::invalid_argument("no vector '" + slot + "'");
}

void set_vector(Model& m, int l, const std::string& slot, Floats data) {
  const VectorSlot place = vector_slot(m, l, slot);
  *place.values = to_vector(data, place.size, slot);
  if (slot == "gate_bias" || slot == "fc2_bias") place.values->resize(round_up(place.size, kLanes));
}

void set_bundles(Model& m, int l, std::optional<Bytes> gate, int gate_type, std::optional<Bytes> up, int up_type, Bytes down,
                 int down_type) {
  Layer& layer = layer_of(m, l);
  const int n = m.config.d_ff, d = m.config.d_model;
  if (gate) require_bytes(*gate, Type(gate_type), n, d, "gate");
  if (up) require_bytes(*up, Type(up_type), n, d, "up");
  require_bytes(down, Type(down_type), n, d, "down");
  nb::gil_scoped_release release;
  m.add_bundles(layer, gate ? gate->data() : nullptr, Type(gate_type), up ? up->data() : nullptr, Type(up_type), down.data(),
                Type(down_type));
}

void check_panel(const Panel& p, int rows, int cols, const char* what) {
  require(p.data && p.rows == rows && p.cols == cols, std::string(what) + ": missing or of the wrong shape");
}

void check_norm(const Model& m, const NormWeights& norm, const char* what) {
  const bool bias = !m.config.layer_norm || int(norm.bias.size()) == m.config.d_model;
  require(int(norm.weight.size()) == m.config.d_model && bias, std::string(what) + " missing");
}

// Every tensor that forward() will read is there and has the right shape.
void check_complete(const Model& m) {
  const Config& c = m.config;
  const int q = c.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
  check_panel(m.embedding, c.n_vocab, c.d_model, "embedding");
  check_panel(m.head, c.n_vocab, c.d_model, "head");
  check_norm(m, m.output_norm, "output_norm");
  if (m.positions.data) check_panel(m.positions, m.positions.rows, c.d_model, "positions");
  require(int(m.rope_frequency.size()) * 2 <= c.head_dim, "more rope frequencies than pairs in a head");
  for (const Layer& l : m.layers) {
    const auto by_input = [&l](Site site) { return l.site(site).rows.data != nullptr; };
    if (!by_input(Site::Qkv)) {
      check_panel(l.q, q, c.d_model, "q");
      check_panel(l.k, kv, c.d_model, "k");
      check_panel(l.v, kv, c.d_model, "v");
    }
    if (!by_input(Site::O)) check_panel(l.o, c.d_model, q, "o");
    check_norm(m, l.attn_norm, "attn_norm");
    check_norm(m, l.ffn_norm, "ffn_norm");
    if (c.mode != Mode::Predicted && !by_input(Site::GateUp)) check_panel(l.gate, c.d_ff, c.d_model, "gate");
    if (c.mode == Mode::Dense) {
      if (c.gated && !by_input(Site::GateUp)) check_panel(l.up, c.d_ff, c.d_model, "up");
      if (!by_input(Site::Down)) check_panel(l.down, c.d_model, c.d_ff, "down");
    } else {
      require(l.bundles && (l.gate_row.bytes > 0) == (c.mode == Mode::Predicted), "neuron rows missing");
      require((l.up_row.bytes > 0) == c.gated, "up rows missing");
    }
    if (c.mode == Mode::Predicted) {
      check_panel(l.fc1, l.fc1.rows, c.d_model, "fc1");
      check_panel(l.fc2, c.d_ff, l.fc1.rows, "fc2");
    }
  }
}

// Packed bytes of each part, from which bytes per token follow.
nb::dict sizes(const Model& m) {
  size_t attention = 0, predictor = 0, gates = 0, ups = 0, downs = 0;
  for (const Layer& l : m.layers) {
    attention += l.q.bytes() + l.k.bytes() + l.v.bytes() + l.o.bytes();
    predictor += l.fc1.bytes() + l.fc2.bytes() + l.fc2_bias.size() * sizeof(float);
    gates += l.gate.bytes() + m.config.d_ff * l.gate_row.bytes;
    ups += l.up.bytes() + m.config.d_ff * l.up_row.bytes;
    downs += l.down.bytes() + m.config.d_ff * l.down_row.bytes;
  }
  nb::dict d;
  d["attention"] = attention;
  d["predictor"] = predictor;
  d["gate"] = gates;
  d["up"] = ups;
  d["down"] = downs;
  d["head"] = m.head.bytes();
  d["total"] = m.weight_bytes();
  return d;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.attr("__doc__") = "The CPU engine: weights packed for sparse reading, and the kernels over them.";

  nb::class_<Model>(m, "Model")
      .def("__init__",
           [](Model* self, int n_layers, int d_model, int d_ff, int n_heads, int n_kv_heads, int head_dim, int n_vocab,
              float norm_eps, int value, int score, int mode, int threads, size_t weight_bytes,
              std::optional<std::string> isa, bool layer_norm, bool parallel, bool gated) {
             const Config c{n_layers, d_model,  d_ff,       n_heads,  n_kv_heads, head_dim, n_vocab, norm_eps,
                            {Value(value), Score(score)}, Mode(mode), layer_norm, parallel, gated};
             check(c, threads);
             new (self) Model(c, threads, weight_bytes, kernels(isa ? isa->c_str() : nullptr));
           },
           nb::kw_only(), "n_layers"_a, "d_model"_a, "d_ff"_a, "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "n_vocab"_a,
           "norm_eps"_a, "value"_a, "score"_a, "mode"_a, "threads"_a, "weight_bytes"_a, "isa"_a = nb::none(),
           "layer_norm"_a = false, "parallel"_a = false, "gated"_a = true)
      .def("set_panel", &set_panel, "layer"_a, "slot"_a, "type"_a, "data"_a, "rows"_a, "cols"_a, "order"_a = nb::none())
      .def("set_input_rows", &set_input_rows, "layer"_a, "slot"_a, "types"_a, "data"_a)
      .def("set_least_inputs", &set_least_inputs, "layer"_a, "slot"_a, "least"_a)
      .def("tie_head", [](Model& m) { m.head = m.embedding; })
      .def("set_bundles", &set_bundles, "layer"_a, "gate"_a.none(), "gate_type"_a, "up"_a.none(), "up_type"_a, "down"_a,
           "down_type"_a)
      .def("set_vector", &set_vector, "layer"_a, "slot"_a, "values"_a)
      .def("set_rope", [](Model& m, Floats f, float scale) {
        m.rope_frequency = to_vector(f, f.size(), "rope");
        m.rope_scale = scale;
      }, "frequencies"_a, "scale"_a = 1.0f)
      .def("set_window", [](Model& m, int l, int window) { layer_of(m, l).window = std::max(window, 0); })
      .def("set_firing", [](Model& m, int l, Floats thresholds) {
        Layer& layer = layer_of(m, l);
        const size_t n = layer.n_neurons ? layer.n_neurons : m.config.d_ff;
        require(thresholds.size() == 1 || thresholds.size() == n, "one threshold, or one per neuron");
        layer.firing.assign(thresholds.data(), thresholds.data() + thresholds.size());
        // No neuron of the padding fires.
        if (n > 1 && thresholds.size() == n) layer.firing.resize(round_up(n, 64), std::numeric_limits<float>::infinity());
      }, "layer"_a, "thresholds"_a)
      .def("set_predictor", [](Model& m, int l, float threshold, bool relu, bool normed) {
        Layer& layer = layer_of(m, l);
        layer.predictor_threshold = threshold;
        layer.predictor_relu = relu;
        layer.predictor_normed = normed;
      }, "layer"_a, "threshold"_a, "relu"_a, "normed"_a)
      .def("set_hot", [](Model& m, int l, Masks hot) {
        require(int(hot.size()) == round_up(m.config.d_ff, kLanes) / kLanes, "one mask per 16 neurons");
        layer_of(m, l).hot.assign(hot.data(), hot.data() + hot.size());
      })
      .def("check", &check_complete)
      .def("sizes", &sizes)
      .def_prop_rw("input_sparsity", [](const Model& m) { return m.input_sparsity; }, [](Model& m, double share) {
        require(share >= 0 && share < 1, "input_sparsity: 0 to 1");
        m.input_sparsity = share;
      })
      .def_prop_ro("isa", [](const Model& m) { return m.k.name; })
      .def_prop_ro("threads", [](const Model& m) { return m.team.size(); });

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const char* const* n = available_isas(); *n; ++n) names.emplace_back(*n);
    return names;
  });
  m.def("read_bandwidth",
        [](int threads, size_t bytes, int repetitions, bool prefetching) {
          require(threads >= 1 && bytes >= 4096 && repetitions >= 1, "nothing to measure");
          nb::gil_scoped_release release;
          return read_bandwidth(threads, bytes, repetitions, prefetching);
        },
        "n_threads"_a, "n_bytes"_a = size_t(1) << 30, "repetitions"_a = 5, "prefetching"_a = false,
        "Best read bandwidth of several passes, GB/s: plain loads, or prefetching for memory ahead of them.");
  bind_ops(m);
  bind_sequence(m);
  bind_parts(m);
}

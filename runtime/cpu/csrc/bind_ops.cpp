#include "bind_ops.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "buffers.h"
#include "pass.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hotcold;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

nb::ndarray<nb::numpy, float> array(std::vector<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  float* data = new float[n]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::ndarray<nb::numpy, float>(data, shape.size(), shape.data(), owner);
}

ActsBuffer acts_of(const Kernels& k, Matrix x) {
  ActsBuffer acts(int(x.shape(1)), int(x.shape(0)), true);
  Prefetches prefetches;
  for (size_t t = 0; t < x.shape(0); ++t) {
    std::memcpy(acts.acts.f + t * acts.acts.width, x.data() + t * x.shape(1), x.shape(1) * sizeof(float));
    k.quantize(acts.acts, int(t), 0, acts.acts.blocks(), prefetches);
    k.arrange(acts.acts, int(t), prefetches);
  }
  return acts;
}

void check_rows(int type, Bytes w, size_t cols) {
  if (w.shape(1) != gguf_row_bytes(Type(type), int(cols))) throw std::invalid_argument("weight rows do not fit x");
}

// [tokens, rows] = x [tokens, cols] . w [rows, cols] through the panel layout.
nb::ndarray<nb::numpy, float> panel(const std::string& isa, int type, Bytes w, Matrix x) {
  check_rows(type, w, x.shape(1));
  const Kernels& k = kernels(isa.c_str());
  const int rows = int(w.shape(0)), cols = int(x.shape(1)), tokens = int(x.shape(0)), stride = round_up(rows, kLanes);
  Block<uint8_t> packed(panel_bytes(Type(type), rows, cols));
  pack_panel(Type(type), w.data(), rows, cols, nullptr, 0, rows, packed.get());
  ActsBuffer acts = acts_of(k, x);
  auto out = array({size_t(tokens), size_t(stride)});
  k.panel(Type(type), packed.get(), cols, 0, stride / kLanes, acts.acts, tokens, out.data(), stride);
  return out;
}

// The rows of a packed panel, unpacked again.
nb::ndarray<nb::numpy, float> unpack_panel(int type, Bytes w, int cols) {
  check_rows(type, w, cols);
  const int rows = int(w.shape(0));
  Block<uint8_t> packed(panel_bytes(Type(type), rows, cols));
  pack_panel(Type(type), w.data(), rows, cols, nullptr, 0, rows, packed.get());
  auto out = array({size_t(rows), size_t(cols)});
  for (int r = 0; r < rows; ++r) panel_row(Type(type), packed.get(), cols, r, out.data() + size_t(r) * cols);
  return out;
}

// [rows, tokens wanted] through the layout of gate and up rows.
nb::ndarray<nb::numpy, float> row_dot(const std::string& isa, int type, Bytes w, Matrix x, Ints tokens) {
  check_rows(type, w, x.shape(1));
  const Kernels& k = kernels(isa.c_str());
  const int cols = int(x.shape(1));
  const size_t bytes = (row_bytes(Type(type), cols) + 63) / 64 * 64;
  Block<uint8_t> packed(bytes * w.shape(0));
  std::vector<const uint8_t*> rows;
  for (size_t r = 0; r < w.shape(0); ++r) {
    pack_row(Type(type), w.data() + r * w.shape(1), cols, packed.get() + r * bytes);
    rows.push_back(packed.get() + r * bytes);
  }
  ActsBuffer acts = acts_of(k, x);
  auto out = array({w.shape(0), tokens.size()});
  Prefetches prefetches;
  k.row_dot(Type(type), rows.data(), int(rows.size()), acts.acts, tokens.data(), int(tokens.size()), out.data(), prefetches);
  return out;
}

// [n] = sum of a[i] * w[i] over up to 16 down rows.
nb::ndarray<nb::numpy, float> down(const std::string& isa, int type, Bytes w, Vector a, int n) {
  check_rows(type, w, n);
  if (w.shape(0) > 16 || a.size() != w.shape(0)) throw std::invalid_argument("1 to 16 rows, one multiplier each");
  const Kernels& k = kernels(isa.c_str());
  const size_t bytes = (down_bytes(Type(type), n) + 63) / 64 * 64;
  Block<uint8_t> packed(bytes * w.shape(0));
  std::vector<const uint8_t*> rows;
  for (size_t r = 0; r < w.shape(0); ++r) {
    pack_down(Type(type), w.data() + r * w.shape(1), n, packed.get() + r * bytes);
    rows.push_back(packed.get() + r * bytes);
  }
  Block<float> y(round_up(n, 128));
  Prefetches prefetches;
  k.down(Type(type), rows.data(), a.data(), int(a.size()), n, y.get(), prefetches);
  auto out = array({size_t(n)});
  std::memcpy(out.data(), y.get(), n * sizeof(float));
  return out;
}

// One [tokens, outputs] per matrix, each held as rows [inputs, outputs].
std::vector<nb::ndarray<nb::numpy, float>> multiply_inputs(const std::string& isa, int threads, const std::vector<int>& types,
                                                           const std::vector<Bytes>& w, const std::vector<int>& outputs, Matrix x) {
  const int inputs = int(x.shape(1)), tokens = int(x.shape(0));
  if (tokens < 1 || tokens > kMaxBlock) throw std::invalid_argument("1 to 64 tokens");
  std::vector<InputPart> parts;
  size_t bytes = 1 << 20;
  for (size_t p = 0; p < w.size(); ++p) {
    check_rows(types.at(p), w[p], outputs.at(p));
    if (int(w[p].shape(0)) != inputs) throw std::invalid_argument("one row per input");
    parts.push_back({Type(types[p]), w[p].data(), outputs[p]});
    bytes += (down_bytes(Type(types[p]), outputs[p]) + 64) * inputs;
  }
  const Config c{1, inputs, kLanes, 1, 1, kLanes, 1, 1e-5f, {Value::Gate, Score::Gate}, Mode::Dense};
  Model m(c, threads, bytes, kernels(isa.c_str()));
  InputRows& rows = m.layers[0].site(Site::Qkv).rows;
  rows = m.add_input_rows(inputs, parts);
  Model::Buffers buffers(c, threads, 1, rows.width());
  Sequence sequence(m, 1);
  ActsBuffer acts(inputs, tokens, false);
  for (int t = 0; t < tokens; ++t) std::copy_n(x.data() + size_t(t) * inputs, inputs, acts.acts.f + size_t(t) * acts.acts.width);
  std::vector<nb::ndarray<nb::numpy, float>> results;
  std::vector<Pass::Outputs> out;
  for (int n : outputs) {
    results.push_back(array({size_t(tokens), size_t(n)}));
    out.push_back({results.back().data(), n});
  }
  Pass pass{m, buffers, sequence, nullptr, tokens, 1, 0};
  m.team.run([&](int thread) { pass.multiply_inputs(thread, 0, Site::Qkv, acts.acts, out.data()); });
  return results;
}

nb::ndarray<nb::numpy, float> leave_out(const std::string& isa, Vector x, double share) {
  Block<float> kept(padded(int(x.size())));
  std::copy_n(x.data(), x.size(), kept.get());
  leave_out_smallest(kernels(isa.c_str()), kept.get(), int(x.size()), share);
  auto out = array({x.size()});
  std::copy_n(kept.get(), x.size(), out.data());
  return out;
}

nb::ndarray<nb::numpy, float> keep_at_least(const std::string& isa, Vector x, float size) {
  if (x.size() % kLanes) throw std::invalid_argument("a length that is a multiple of 16");
  auto out = array({x.size()});
  std::memcpy(out.data(), x.data(), x.size() * sizeof(float));
  kernels(isa.c_str()).keep_at_least(out.data(), int(x.size()), size);
  return out;
}

int count_at_least(const std::string& isa, Vector x, float size) {
  if (x.size() % kLanes) throw std::invalid_argument("a length that is a multiple of 16");
  return kernels(isa.c_str()).count_at_least(x.data(), int(x.size()), size);
}

nb::ndarray<nb::numpy, float> rms_norm(const std::string& isa, Vector x, Vector weight, float eps) {
  if (x.size() != weight.size()) throw std::invalid_argument("x and weight differ in length");
  auto out = array({x.size()});
  Prefetches prefetches;
  kernels(isa.c_str()).rms_norm(x.data(), weight.data(), int(x.size()), eps, out.data(), prefetches);
  return out;
}

Rule rule_of(int value, int score) {
  if (value < 0 || value > int(Value::Gelu) || score < 0 || score > int(Score::GateAndUp)) throw std::invalid_argument("no such rule");
  return {Value(value), Score(score)};
}

Thresholds thresholds_of(Vector thresholds, size_t n) {
  if (thresholds.size() != 1 && thresholds.size() != n) throw std::invalid_argument("one threshold, or one per gate");
  return {thresholds.size() > 1 ? thresholds.data() : nullptr, thresholds.data()[0]};
}

// act(gate) * up where gates fire, and how many do.
std::pair<nb::ndarray<nb::numpy, float>, int> activate(const std::string& isa, int value, int score, Vector gate, Vector up,
                                                       Vector thresholds) {
  if (gate.size() != up.size() || gate.size() % kLanes) throw std::invalid_argument("equal lengths, a multiple of 16");
  auto out = array({gate.size()});
  std::memcpy(out.data(), gate.data(), gate.size() * sizeof(float));
  const int fired = kernels(isa.c_str()).activate(rule_of(value, score), out.data(), up.data(), thresholds_of(thresholds, gate.size()),
                                                  int(gate.size()));
  return {out, fired};
}

// The values of 16 gates, and the bits of those that fire.
std::pair<nb::ndarray<nb::numpy, float>, uint32_t> fires(const std::string& isa, int value, int score, Vector gate, Vector thresholds) {
  if (gate.size() != kLanes) throw std::invalid_argument("16 gates");
  auto out = array({gate.size()});
  std::memcpy(out.data(), gate.data(), gate.size() * sizeof(float));
  const uint32_t bits = kernels(isa.c_str()).fires(rule_of(value, score), out.data(), thresholds_of(thresholds, kLanes));
  return {out, bits};
}

// softmax(q k^T) v of one key-value head over all positions: q [heads, dim], keys and values [positions, dim] in f16.
nb::ndarray<nb::numpy, float> attention(const std::string& isa, Matrix q, Matrix keys, Matrix values) {
  const Kernels& k = kernels(isa.c_str());
  const int heads = int(q.shape(0)), dim = int(q.shape(1)), n = int(keys.shape(0)), tiles = (n + kLanes - 1) / kLanes;
  if (dim % kLanes || int(keys.shape(1)) != dim || values.shape(0) != keys.shape(0) || int(values.shape(1)) != dim)
    throw std::invalid_argument("dim must be a multiple of 16 and equal in q, keys and values");
  Block<uint16_t> key_tiles(size_t(tiles) * dim * kLanes), value_rows(size_t(n) * dim), half(dim);
  for (int p = 0; p < n; ++p) {
    k.to_f16(keys.data() + size_t(p) * dim, dim, half.get());
    for (int i = 0; i < dim; ++i) key_tiles[(size_t(p / kLanes) * dim + i) * kLanes + p % kLanes] = half[i];
    k.to_f16(values.data() + size_t(p) * dim, dim, &value_rows[size_t(p) * dim]);
  }
  const int stride = tiles * kLanes;
  Block<float> scores(size_t(heads) * stride);
  auto out = array({size_t(heads), size_t(dim)});
  Prefetches prefetches;
  k.scores(q.data(), heads, dim, key_tiles.get(), 0, tiles, scores.get(), stride, prefetches);
  std::vector<float> sums;
  for (int h = 0; h < heads; ++h) {
    float max;
    sums.push_back(k.softmax(&scores[size_t(h) * stride], 0, n, &max));
  }
  k.values(scores.get(), stride, heads, dim, value_rows.get(), 0, n, out.data(), prefetches);
  for (int i = 0; i < heads * dim; ++i) out.data()[i] /= sums[i / dim];
  return out;
}

}  // namespace

void bind_ops(nb::module_& m) {
  nb::module_ ops = m.def_submodule("ops", "Single kernels, for tests. Weights are GGUF rows as bytes.");
  ops.def("panel", &panel, "isa"_a, "type"_a, "w"_a, "x"_a);
  ops.def("unpack_panel", &unpack_panel, "type"_a, "w"_a, "cols"_a);
  ops.def("row_dot", &row_dot, "isa"_a, "type"_a, "w"_a, "x"_a, "tokens"_a);
  ops.def("down", &down, "isa"_a, "type"_a, "w"_a, "a"_a, "n"_a);
  ops.def("multiply_inputs", &multiply_inputs, "isa"_a, "threads"_a, "types"_a, "w"_a, "outputs"_a, "x"_a);
  ops.def("leave_out_smallest", &leave_out, "isa"_a, "x"_a, "share"_a);
  ops.def("keep_at_least", &keep_at_least, "isa"_a, "x"_a, "size"_a);
  ops.def("count_at_least", &count_at_least, "isa"_a, "x"_a, "size"_a);
  ops.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  ops.def("activate", &activate, "isa"_a, "value"_a, "score"_a, "gate"_a, "up"_a, "thresholds"_a);
  ops.def("fires", &fires, "isa"_a, "value"_a, "score"_a, "gate"_a, "thresholds"_a);
  ops.def("attention", &attention, "isa"_a, "q"_a, "keys"_a, "values"_a);
}

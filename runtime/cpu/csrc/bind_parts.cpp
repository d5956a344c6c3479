#include "bind_parts.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "sequence.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hotcold;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MatrixOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

void set_neurons(Model& m, int l, int n, Bytes gate, int gate_type, std::optional<Bytes> up, int up_type, Bytes down,
                 int down_type, std::optional<Floats> bias) {
  require(l >= 0 && l < m.config.n_layers, "no such layer");
  require(n > 0 && n <= m.config.d_ff, "1 to d_ff neurons");
  const auto fits = [&](const Bytes& rows, int type) { return rows.size() == gguf_row_bytes(Type(type), m.config.d_model) * n; };
  require(fits(gate, gate_type) && fits(down, down_type) && (!up || fits(*up, up_type)), "rows of another size");
  require(up.has_value() == m.config.gated, "up rows are of a model with gates");
  require(!bias || (!m.config.gated && int(bias->size()) == n), "one bias per neuron, and only without gates");
  nb::gil_scoped_release release;
  Layer& layer = m.layers[l];
  m.add_neurons(layer, n, gate.data(), Type(gate_type), up ? up->data() : nullptr, Type(up_type), down.data(), Type(down_type));
  layer.gate_bias.clear();
  if (bias) layer.gate_bias.assign(bias->data(), bias->data() + n);
  layer.n_neurons = n;
}

void run_layers(Sequence& s, MatrixOut x, int first, int last, int position) {
  const Model& m = s.model;
  require(int(x.shape(1)) == m.config.d_model && x.shape(0) > 0, "x must be [tokens, d_model]");
  require(first >= 0 && first < last && last <= m.config.n_layers, "no such layers");
  require(position >= 0 && position + int(x.shape(0)) <= s.n_ctx, "the context is full");
  for (int l = first; l < last; ++l) {
    const Layer& layer = m.layers[l];
    require(layer.q.data && layer.o.data && (layer.down.data || layer.bundles), "a layer that was not loaded");
  }
  nb::gil_scoped_release release;
  s.run_layers(x.data(), int(x.shape(0)), first, last, position);
}

int64_t run_neurons(Sequence& s, int l, Matrix normed, Ints index, Masks tokens, MatrixOut y) {
  const Model& m = s.model;
  require(l >= 0 && l < m.config.n_layers && m.layers[l].n_neurons > 0, "no neurons of this layer");
  const int n = int(normed.shape(0)), count = int(index.size()), last = m.layers[l].n_neurons;
  require(n > 0 && n <= kMaxBlock && int(normed.shape(1)) == m.config.d_model, "normed must be [1 to 64 tokens, d_model]");
  require(y.shape(0) == normed.shape(0) && y.shape(1) == normed.shape(1), "y must have the shape of normed");
  require(n == 1 || tokens.size() == index.size(), "one token mask per neuron");
  for (int i = 0; i < count; ++i)
    require(index.data()[i] >= 0 && index.data()[i] < last && (i == 0 || index.data()[i] > index.data()[i - 1]),
            "neurons must be ascending and in the layer");
  nb::gil_scoped_release release;
  return s.run_neurons(l, normed.data(), n, index.data(), tokens.data(), count, y.data());
}

}  // namespace

void bind_parts(nb::module_& m) {
  nb::module_ parts = m.def_submodule("parts", "Parts of a model whose rest is computed on another device.");
  parts.def("set_neurons", &set_neurons, "model"_a, "layer"_a, "n"_a, "gate"_a, "gate_type"_a, "up"_a.none(), "up_type"_a,
            "down"_a, "down_type"_a, "bias"_a.none() = nb::none(),
            "Holds `n` neurons of a layer, numbered from 0. Without gates, what decides is in their place, plus `bias`.");
  parts.def("run_layers", &run_layers, "sequence"_a, "x"_a, "first"_a, "last"_a, "position"_a,
            "Layers [first, last) on the residual stream x, in place.");
  parts.def("run_neurons", &run_neurons, "sequence"_a, "layer"_a, "normed"_a, "index"_a, "tokens"_a, "y"_a,
            "y = what the listed neurons add; `tokens` has bit t where token t wants a neuron. Returns how many fired.");
}

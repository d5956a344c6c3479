// Python's view of a sequence, and the errors of those who meet in one.
#include "bind_sequence.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "sequence.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hotcold;

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

// Logits given to Python. A fresh array of a whole vocabulary would be mapped, zeroed and unmapped for every token, at
// 3 % of its time, so arrays that Python has dropped are used again. Under the GIL, on both ends.
std::vector<std::vector<float>*> free_logits;

nb::ndarray<nb::numpy, float> logits_array(std::vector<size_t> shape) {
  const size_t n = std::accumulate(shape.begin(), shape.end(), size_t(1), std::multiplies<>());
  const auto found = std::find_if(free_logits.begin(), free_logits.end(), [n](auto* v) { return v->size() == n; });
  std::vector<float>* data = found != free_logits.end() ? *found : new std::vector<float>(n);
  if (found != free_logits.end()) free_logits.erase(found);
  nb::capsule owner(data, [](void* p) noexcept {
    auto* used = static_cast<std::vector<float>*>(p);
    if (free_logits.size() < 4 && used->size() < (1u << 20)) free_logits.push_back(used);
    else delete used;
  });
  return nb::ndarray<nb::numpy, float>(data->data(), shape.size(), shape.data(), owner);
}

nb::ndarray<nb::numpy, float> forward(Sequence& s, Ints tokens, bool all_logits) {
  const size_t vocab = s.model.config.n_vocab;
  require(tokens.size() > 0, "no tokens");
  require(tokens.size() <= size_t(s.n_ctx), "the context is full");  // and what is left of it, once nobody can move
  for (size_t i = 0; i < tokens.size(); ++i)
    require(tokens.data()[i] >= 0 && tokens.data()[i] < s.model.config.n_vocab, "token id out of range");
  auto logits = all_logits ? logits_array({tokens.size(), vocab}) : logits_array({vocab});
  {
    nb::gil_scoped_release release;
    s.forward(tokens.data(), int(tokens.size()), all_logits, logits.data());
  }
  return logits;
}

nb::dict stats(Sequence& s) {
  const Sequence::Stats found = s.stats();
  std::vector<int64_t> fired, predicted, missed;
  for (const LayerStats& l : found.layers) {
    fired.push_back(l.fired);
    predicted.push_back(l.predicted);
    missed.push_back(l.missed);
  }
  nb::dict d;
  d["tokens"] = found.tokens;
  d["fired"] = fired;
  d["predicted"] = predicted;
  d["missed"] = missed;
  nb::dict inputs;
  for (int i = 0; i < kSites; ++i) {
    const InputStats& site = found.inputs[i];
    inputs[kSiteNames[i]] = std::vector<int64_t>{site.bytes, site.seen, site.kept};
  }
  d["inputs"] = inputs;
  return d;
}

// Raises what a function of hotcold.runtime.turns makes: engines on devices raise the same.
void raise(const char* name) {
  const nb::object error = nb::module_::import_("hotcold.runtime.turns").attr(name)();
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

}  // namespace

void bind_sequence(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Busy&) {
      raise("busy");
    } catch (const Forked&) {
      raise("forked");
    }
  });
  nb::class_<Sequence>(m, "Sequence", "One text that a model computes; those of one model take turns.")
      .def("__init__",
           [](Sequence* self, const Model& model, int n_ctx) {
             require(n_ctx > 0, "sizes must be positive");
             const int rows = model.positions.data ? model.positions.rows : n_ctx;
             require(n_ctx <= rows, "the model has learned positions for " + std::to_string(rows) + " tokens only");
             new (self) Sequence(model, n_ctx);
           },
           "model"_a, "n_ctx"_a, nb::keep_alive<1, 2>())
      .def("forward", &forward, "tokens"_a, "all_logits"_a = false)
      .def("stats", &stats)
      .def("reset_stats", &Sequence::reset_stats)
      .def_prop_rw("audit", &Sequence::audit, &Sequence::set_audit)
      .def_prop_rw("position", &Sequence::position, &Sequence::set_position)
      .def_prop_ro("n_ctx", [](const Sequence& s) { return s.n_ctx; });
}

// The engine without Python, for the sanitizers: random models of every type and mode on 1 to 4 threads, in blocks and
// token by token, every ISA that the machine runs against plain C++; sequences in turns, from one thread and from several, and
// after a fork; and the thread team on its own, started and stopped many times.
// Prints one line per case; exits with 1 if any fails.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "half.h"
#include "sequence.h"

using namespace hotcold;

namespace {

std::mt19937 rng(7);
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok) ++failures;
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", what.c_str());
}

// Random GGUF bytes of a matrix: scales of a fixed size, random quants.
std::vector<uint8_t> random_matrix(Type type, int rows, int cols) {
  std::vector<uint8_t> bytes(gguf_row_bytes(type, cols) * rows);
  std::normal_distribution<float> normal(0, 1 / std::sqrt(float(cols)));
  if (is_quantized(type)) {
    const int block = type == Type::Q4_0 ? 18 : 34;
    const uint16_t scale = f32_to_f16((type == Type::Q4_0 ? 0.22f : 0.014f) / std::sqrt(float(cols)));
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(rng());
    for (size_t at = 0; at < bytes.size(); at += block) std::memcpy(&bytes[at], &scale, 2);
    return bytes;
  }
  for (int i = 0; i < rows * cols; ++i) {
    const float value = normal(rng);
    const uint16_t half = type == Type::F16 ? f32_to_f16(value) : uint16_t(std::bit_cast<uint32_t>(value) >> 16);
    if (type == Type::F32) std::memcpy(&bytes[size_t(i) * 4], &value, 4);
    else std::memcpy(&bytes[size_t(i) * 2], &half, 2);
  }
  return bytes;
}

constexpr int kLayers = 2, kVocab = 70, kRank = 32, kContext = 200;

std::vector<int32_t> random_tokens() {
  std::vector<int32_t> tokens(70);
  for (int32_t& t : tokens) t = int32_t(rng() % kVocab);
  return tokens;
}

struct Shape {
  int d_model, d_ff, heads, kv_heads, dim;
};
constexpr Shape kSmall{96, 200, 6, 2, 16};
Shape shape = kSmall;  // of all models that are made

struct Weights {
  Type type;
  std::vector<uint8_t> embedding, positions, q, k, v, o, gate, up, down, down_t, fc1, fc2;
  explicit Weights(Type t) : type(t) {
    // d_ff need not be a multiple of 32 where down is stored by neurons; the dense form then falls back to F16.
    embedding = random_matrix(t, kVocab, shape.d_model);
    positions = random_matrix(t, kContext, shape.d_model);
    q = random_matrix(t, shape.heads * shape.dim, shape.d_model);
    k = random_matrix(t, shape.kv_heads * shape.dim, shape.d_model);
    v = random_matrix(t, shape.kv_heads * shape.dim, shape.d_model);
    o = random_matrix(t, shape.d_model, shape.heads * shape.dim);
    gate = random_matrix(t, shape.d_ff, shape.d_model);
    up = random_matrix(t, shape.d_ff, shape.d_model);
    down = random_matrix(Type::F16, shape.d_model, shape.d_ff);
    down_t = random_matrix(t, shape.d_ff, shape.d_model);
    fc1 = random_matrix(t, kRank, shape.d_model);
    fc2 = random_matrix(t, shape.d_ff, kRank);
  }
};

// What a Llama lacks: LayerNorm, biases, learned positions, norms of heads, a window, a parallel FFN without a gate; and
// predictors of another kind.
void add_parts(Model& m, const Weights& w) {
  std::normal_distribution<float> normal(0, 0.3f);
  std::mt19937 same(11);  // the same parts for every engine that is compared
  const auto fill = [&](std::vector<float>& v, int n) {
    for (int i = 0; i < n; ++i) v.push_back(normal(same));
  };
  m.positions = m.add_panel(w.type, w.positions.data(), kContext, shape.d_model, nullptr);
  m.rope_frequency.clear();
  fill(m.output_norm.bias, shape.d_model);
  for (Layer& l : m.layers) {
    for (NormWeights* norm : {&l.attn_norm, &l.ffn_norm}) fill(norm->bias, shape.d_model);
    fill(l.q_bias, shape.heads * shape.dim);
    fill(l.k_bias, shape.kv_heads * shape.dim);
    fill(l.v_bias, shape.kv_heads * shape.dim);
    fill(l.o_bias, shape.d_model);
    fill(l.gate_bias, shape.d_ff);
    l.gate_bias.resize(round_up(shape.d_ff, kLanes));
    fill(l.down_bias, shape.d_model);
    l.q_norm.assign(shape.dim, 1.1f);
    l.k_norm.assign(shape.dim, 0.9f);
    l.predictor_relu = false;
    l.predictor_normed = true;
    l.fc2_bias.assign(round_up(shape.d_ff, kLanes), 0.5f);
  }
  m.layers[0].window = 9;
}

std::unique_ptr<Model> make(const Weights& w, Mode mode, int threads, const Kernels& k, float threshold, bool llama = true) {
  Config c{kLayers, shape.d_model, shape.d_ff, shape.heads, shape.kv_heads, shape.dim, kVocab, 1e-5f, {Value::Gate, Score::Gate}, mode};
  c.layer_norm = c.parallel = !llama;
  c.gated = llama;
  auto m = std::make_unique<Model>(c, threads, size_t(8) << 20, k);
  m->embedding = m->head = m->add_panel(w.type, w.embedding.data(), kVocab, shape.d_model, nullptr);
  m->output_norm.weight.assign(shape.d_model, 1.0f);
  for (int i = 0; i < shape.dim / 2; ++i) m->rope_frequency.push_back(std::pow(10000.0f, -float(i) / (shape.dim / 2)));
  for (Layer& l : m->layers) {
    l.attn_norm.weight.assign(shape.d_model, 1.0f);
    l.ffn_norm.weight.assign(shape.d_model, 1.0f);
    l.q = m->add_panel(w.type, w.q.data(), shape.heads * shape.dim, shape.d_model, nullptr);
    l.k = m->add_panel(w.type, w.k.data(), shape.kv_heads * shape.dim, shape.d_model, nullptr);
    l.v = m->add_panel(w.type, w.v.data(), shape.kv_heads * shape.dim, shape.d_model, nullptr);
    l.o = m->add_panel(w.type, w.o.data(), shape.d_model, shape.heads * shape.dim, nullptr);
    if (mode != Mode::Predicted) l.gate = m->add_panel(w.type, w.gate.data(), shape.d_ff, shape.d_model, nullptr);
    if (mode == Mode::Dense) {
      if (llama) l.up = m->add_panel(w.type, w.up.data(), shape.d_ff, shape.d_model, nullptr);
      l.down = m->add_panel(Type::F16, w.down.data(), shape.d_model, shape.d_ff, nullptr);
    } else {
      m->add_bundles(l, mode == Mode::Predicted ? w.gate.data() : nullptr, w.type, llama ? w.up.data() : nullptr, w.type, w.down_t.data(),
                     w.type);
    }
    if (mode == Mode::Predicted) {
      l.fc1 = m->add_panel(w.type, w.fc1.data(), kRank, shape.d_model, nullptr);
      l.fc2 = m->add_panel(w.type, w.fc2.data(), shape.d_ff, kRank, nullptr);
      l.predictor_threshold = threshold;
      l.hot.assign(round_up(shape.d_ff, kLanes) / kLanes, 0x0101);
    }
  }
  if (!llama) add_parts(*m, w);
  return m;
}

std::vector<float> run(Sequence& s, const std::vector<int32_t>& tokens, bool by_token) {
  std::vector<float> logits(tokens.size() * kVocab);
  if (!by_token) s.forward(tokens.data(), int(tokens.size()), true, logits.data());
  else for (size_t i = 0; i < tokens.size(); ++i) s.forward(&tokens[i], 1, false, &logits[i * kVocab]);
  return logits;
}

std::vector<float> run(const Model& m, const std::vector<int32_t>& tokens, bool by_token, bool audit = false) {
  Sequence s(m, kContext);
  s.set_audit(audit);
  return run(s, tokens, by_token);
}

double error(const std::vector<float>& got, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / size);
}

void test_models() {
  const char* types[] = {"F32", "F16", "BF16", "Q8_0", "Q4_0"};
  const char* modes[] = {"dense", "exact", "predicted"};
  const std::vector<int32_t> tokens = random_tokens();
  const std::vector<int32_t> few(tokens.begin(), tokens.begin() + 18);  // one by one: across a tile of the cache
  for (Type type : {Type::F32, Type::F16, Type::BF16, Type::Q8_0, Type::Q4_0}) {
    const Weights w(type);
    for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted})
      for (const char* const* isa = available_isas(); *isa; ++isa) {
        // Above every logit or below: no token sits at the threshold, where rounding decides.
        const float threshold = mode == Mode::Predicted ? -1e9f : 0;
        const auto one = make(w, mode, 1, kernels("generic"), threshold);
        const std::vector<float> expected = run(*one, tokens, false);
        for (int threads : {1, 3})
          for (bool by_token : {false, true}) {
            const auto m = make(w, mode, threads, kernels(*isa), threshold);
            const bool audit = mode == Mode::Predicted && threads == 3;
            const double e = error(run(*m, by_token ? few : tokens, by_token, audit), expected);
            expect(e < (is_quantized(type) ? 0.05 : 1e-3),
                   std::string(types[int(type)]) + " " + modes[int(mode)] + " " + *isa + " threads " + std::to_string(threads) +
                       (by_token ? " by token" : " block") + ": " + std::to_string(e));
          }
      }
    const auto none = make(w, Mode::Predicted, 2, kernels(), 1e9f);
    Sequence cold(*none, kContext);
    run(cold, tokens, false);
    const int64_t hot = 2 * (shape.d_ff / kLanes) + 1;  // 0x0101 in every full group; the last group has 8 neurons
    const int64_t after_first = int64_t(tokens.size()) - 1;
    expect(cold.stats().layers[0].predicted == shape.d_ff + hot * after_first, "position 0 in full, then hot neurons only");
  }
}

// In which order lines are asked for: "r0 q0" are the first lines of rows r and q.
void test_prefetches() {
  static uint8_t rows[100][1024];
  Prefetches prefetches;
  const auto fed = [&](int rounds) {
    std::string lines;
    prefetches.feed(rounds, [&](const uint8_t* line) {
      const size_t at = line - rows[0];
      lines += std::to_string(at / 1024) + "." + std::to_string(at % 1024 / 64) + " ";
    });
    return lines;
  };
  prefetches.close();
  expect(fed(9) == "", "nothing to prefetch_group for");
  for (int r : {0, 1, 2}) prefetches.add(rows[r], 100);
  expect(fed(9) == "", "three rows wait for a fourth");
  prefetches.add(rows[3], 140);
  expect(fed(2) == "0.0 1.0 2.0 3.0 0.1 1.1 2.1 3.1 ", "four rows side by side");
  expect(fed(9) == "0.2 1.2 2.2 3.2 ", "as long as the longest");
  for (int r : {4, 5}) prefetches.add(rows[r], 256);
  prefetches.close();
  expect(fed(9) == "4.0 4.1 4.2 4.3 5.0 5.1 5.2 5.3 ", "fewer rows, one after the other");
  prefetches.add(rows[6], 64);
  prefetches.add_run(rows[7], 512);
  expect(fed(9) == "6.0 6.1 6.2 6.3 7.0 7.1 7.2 7.3 7.4 7.5 7.6 7.7 ", "a run after a row that is still open");
  for (int r = 0; r < 100; ++r) prefetches.add_run(rows[r], 64);
  std::string kept = fed(1000);
  expect(kept.starts_with("0.0 ") && kept.ends_with("62.3 "), "a full queue keeps the oldest");
  prefetches.add_run(rows[9], 1024);
  fed(1);
  prefetches.clear();
  prefetches.add_run(rows[8], 64);
  expect(fed(9) == "8.0 8.1 8.2 8.3 ", "nothing is left of what was cleared");
}

// The other structures: threads, blocks and kernels against plain C++ on one thread.
void test_structures() {
  const std::vector<int32_t> tokens = random_tokens();
  for (Type type : {Type::F32, Type::Q4_0}) {
    const Weights w(type);
    for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted}) {
      const std::vector<float> expected = run(*make(w, mode, 1, kernels("generic"), -1e9f, false), tokens, false);
      for (int threads : {1, 3})
        for (bool by_token : {false, true}) {
          const auto m = make(w, mode, threads, kernels(), -1e9f, false);
          const double e = error(run(*m, tokens, by_token, mode == Mode::Predicted), expected);
          expect(e < (is_quantized(type) ? 0.05 : 1e-3), "LayerNorm, biases, window, mode " + std::to_string(int(mode)) +
                                                              " threads " + std::to_string(threads) +
                                                              (by_token ? " by token: " : " block: ") + std::to_string(e));
        }
    }
  }
}

// Rows of more than 16 blocks, and keys and values that are longer than what is asked for ahead of them.
void test_long_rows() {
  const std::vector<int32_t> tokens = random_tokens();
  for (Shape longer : {Shape{576, 200, 2, 1, 128}, Shape{576, 200, 2, 2, 128}}) {
    shape = longer;
    for (Type type : {Type::F16, Type::Q8_0, Type::Q4_0}) {
      const Weights w(type);
      for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted}) {
        const std::vector<float> expected = run(*make(w, mode, 1, kernels("generic"), -1e9f), tokens, false);
        for (bool by_token : {false, true}) {
          const double e = error(run(*make(w, mode, 3, kernels(), -1e9f), tokens, by_token), expected);
          expect(e < (is_quantized(type) ? 0.05 : 1e-3), "long rows, type " + std::to_string(int(type)) + " mode " +
                                                             std::to_string(int(mode)) + " heads " + std::to_string(shape.kv_heads) +
                                                             (by_token ? " by token: " : " block: ") + std::to_string(e));
        }
      }
    }
  }
  shape = kSmall;
}

// Layers one by one, and the neurons of a layer in two parts, against all at once on one thread.
void test_parts() {
  const int tokens = 20;
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> input(size_t(tokens) * shape.d_model);
  for (float& v : input) v = normal(rng);
  std::vector<int32_t> all, even, odd;
  for (int i = 0; i < shape.d_ff; ++i) {
    all.push_back(i);
    (i % 2 ? odd : even).push_back(i);
  }
  const std::vector<uint64_t> every(shape.d_ff, (uint64_t(1) << tokens) - 1);
  const Weights w(Type::F32);
  for (int threads : {1, 3})
    for (int n : {1, tokens}) {
      const auto m = make(w, Mode::Predicted, threads, kernels(), -1e9f), one = make(w, Mode::Predicted, 1, kernels(), -1e9f);
      m->layers[0].n_neurons = one->layers[0].n_neurons = shape.d_ff;
      Sequence parts(*m, kContext), whole(*one, kContext);
      const std::string what = " threads " + std::to_string(threads) + " tokens " + std::to_string(n);
      std::vector<float> together(size_t(n) * shape.d_model), first = together, second = together;
      const int64_t fired = whole.run_neurons(0, input.data(), n, all.data(), every.data(), shape.d_ff, together.data());
      const int64_t halves = parts.run_neurons(0, input.data(), n, even.data(), every.data(), shape.d_ff / 2, first.data()) +
                             parts.run_neurons(0, input.data(), n, odd.data(), every.data(), shape.d_ff / 2, second.data());
      for (size_t i = 0; i < first.size(); ++i) first[i] += second[i];
      expect(halves == fired && error(first, together) < 1e-5, "neurons in two parts" + what);
      parts.run_neurons(0, input.data(), n, all.data(), every.data(), 0, first.data());
      expect(std::all_of(first.begin(), first.end(), [](float v) { return v == 0; }), "no neurons" + what);

      std::vector<float> x(input.begin(), input.begin() + size_t(n) * shape.d_model), y = x;
      whole.run_layers(x.data(), n, 0, kLayers, 0);
      for (int l = 0; l < kLayers; ++l) parts.run_layers(y.data(), n, l, l + 1, 0);
      expect(error(y, x) < 1e-4, "layers one by one" + what);
    }
}

// Attention held by input: all inputs, or the larger half; threads, blocks and kernels against plain C++ on one thread.
void test_inputs() {
  const std::vector<int32_t> tokens = random_tokens();
  for (Type type : {Type::F32, Type::Q8_0, Type::Q4_0}) {
    const Weights w(type);
    const auto q = random_matrix(type, shape.d_model, shape.heads * shape.dim), k = random_matrix(type, shape.d_model, shape.kv_heads * shape.dim),
               v = random_matrix(type, shape.d_model, shape.kv_heads * shape.dim), o = random_matrix(type, shape.heads * shape.dim, shape.d_model);
    const auto by_input = [&](int threads, const Kernels& kernels, Mode mode, float share, bool llama) {
      auto m = make(w, mode, threads, kernels, mode == Mode::Predicted ? -1e9f : 0, llama);
      for (Layer& l : m->layers) {
        l.q = l.k = l.v = l.o = {};
        l.site(Site::Qkv).rows = m->add_input_rows(
            shape.d_model, {{type, q.data(), shape.heads * shape.dim}, {type, k.data(), shape.kv_heads * shape.dim}, {type, v.data(), shape.kv_heads * shape.dim}});
        l.site(Site::O).rows = m->add_input_rows(shape.heads * shape.dim, {{type, o.data(), shape.d_model}});
      }
      m->input_sparsity = share;
      return m;
    };
    for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted})
      for (bool llama : {true, false}) {
        const float share = mode == Mode::Predicted ? 0 : 0.5f;
        const std::vector<float> expected = run(*by_input(1, kernels("generic"), mode, share, llama), tokens, false);
        for (int threads : {1, 3})
          for (bool by_token : {false, true}) {
            const double e = error(run(*by_input(threads, kernels(), mode, share, llama), tokens, by_token), expected);
            // Rounding decides which inputs are left out at the edge.
            expect(e < (is_quantized(type) ? 0.3 : 1e-3),
                   "by input, type " + std::to_string(int(type)) + " mode " + std::to_string(int(mode)) + " threads " +
                       std::to_string(threads) + (by_token ? " by token: " : " block: ") + std::to_string(e));
          }
      }
  }
}

// Rules at all four sites, the FFN's matrices by input where the mode has them so: every other input never counts.
void test_input_rules() {
  const std::vector<int32_t> tokens = random_tokens();
  const int d = shape.d_model, ff = shape.d_ff;
  for (Type type : {Type::F32, Type::Q4_0}) {
    const Weights w(type);
    const auto gate = random_matrix(type, d, ff), up = random_matrix(type, d, ff), down = random_matrix(type, ff, d);
    const auto ruled = [&](int threads, const Kernels& kernels, Mode mode) {
      auto m = make(w, mode, threads, kernels, -1e9f);
      for (Layer& l : m->layers) {
        for (int site = 0; site < kSites; ++site) {
          const int width = Site(site) == Site::O ? shape.heads * shape.dim : Site(site) == Site::Down ? ff : d;
          for (int i = 0; i < width; ++i) l.inputs[site].least.push_back(i % 2 ? 1e30f : 0);
        }
        if (mode == Mode::Dense) {
          l.gate = l.up = l.down = {};
          l.site(Site::GateUp).rows = m->add_input_rows(d, {{type, gate.data(), ff}, {type, up.data(), ff}});
          l.site(Site::Down).rows = m->add_input_rows(ff, {{type, down.data(), d}});
        } else if (mode == Mode::Exact) {
          l.gate = {};
          l.site(Site::GateUp).rows = m->add_input_rows(d, {{type, gate.data(), ff}});
        }
      }
      return m;
    };
    for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted}) {
      const std::vector<float> expected = run(*ruled(1, kernels("generic"), mode), tokens, false);
      for (int threads : {1, 3})
        for (bool by_token : {false, true}) {
          const double e = error(run(*ruled(threads, kernels(), mode), tokens, by_token), expected);
          expect(e < (is_quantized(type) ? 0.05 : 1e-3),
                 "input rules, type " + std::to_string(int(type)) + " mode " + std::to_string(int(mode)) + " threads " +
                     std::to_string(threads) + (by_token ? " by token: " : " block: ") + std::to_string(e));
        }
    }
  }
}

// A model of each mode, with inputs left out and without, and of the structure that Llama lacks.
std::vector<std::unique_ptr<Model>> models(int threads) {
  std::vector<std::unique_ptr<Model>> made;
  const Weights w(Type::Q4_0);
  const int q = shape.heads * shape.dim, kv = shape.kv_heads * shape.dim;
  const auto transposed = [&](int outputs) { return random_matrix(Type::Q4_0, shape.d_model, outputs); };
  for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted})
    for (bool llama : {true, false})
      for (bool by_input : {false, true}) {
        auto m = make(w, mode, threads, kernels(), 0.0f, llama);
        for (Layer& l : m->layers) {
          if (!by_input) continue;
          l.q = l.k = l.v = l.o = {};
          l.site(Site::Qkv).rows = m->add_input_rows(shape.d_model, {{Type::Q4_0, transposed(q).data(), q}, {Type::Q4_0, transposed(kv).data(), kv}, {Type::Q4_0, transposed(kv).data(), kv}});
          l.site(Site::O).rows = m->add_input_rows(q, {{Type::Q4_0, random_matrix(Type::Q4_0, q, shape.d_model).data(), shape.d_model}});
        }
        m->input_sparsity = by_input ? 0.4 : 0;
        made.push_back(std::move(m));
      }
  return made;
}

bool same_counts(Sequence& a, Sequence& b) {
  const Sequence::Stats x = a.stats(), y = b.stats();
  bool same = x.tokens == y.tokens;
  for (int i = 0; i < kSites; ++i)
    same = same && x.inputs[i].bytes == y.inputs[i].bytes && x.inputs[i].seen == y.inputs[i].seen && x.inputs[i].kept == y.inputs[i].kept;
  for (int l = 0; l < kLayers; ++l)
    same = same && x.layers[l].fired == y.layers[l].fired && x.layers[l].predicted == y.layers[l].predicted && x.layers[l].missed == y.layers[l].missed;
  return same;
}

// Sequences of other lengths and contexts, token by token in turns: bit for bit what each gives alone.
void test_sequences() {
  const std::vector<int32_t> a = random_tokens(), b = random_tokens(), block(b.begin(), b.begin() + 30);
  for (int threads : {1, 3})
    for (const auto& m : models(threads)) {
      Sequence alone_a(*m, 80), alone_b(*m, kContext), one(*m, 80), other(*m, kContext);
      alone_b.set_audit(true);
      other.set_audit(true);
      const std::vector<float> expected_a = run(alone_a, a, true), first_b = run(alone_b, block, false), expected_b = run(alone_b, b, true);
      std::vector<float> got_a(expected_a.size()), got_b(expected_b.size()), got_first(first_b.size());
      for (size_t i = 0; i < a.size(); ++i) {
        one.forward(&a[i], 1, false, &got_a[i * kVocab]);
        if (i == 0) got_first = run(other, block, false);
        other.forward(&b[i], 1, false, &got_b[i * kVocab]);
      }
      expect(got_a == expected_a && got_b == expected_b && got_first == first_b && same_counts(one, alone_a) && same_counts(other, alone_b),
             "two sequences in turns, mode " + std::to_string(int(m->config.mode)) + (m->config.gated ? "" : " without gates") +
                 (m->input_sparsity ? " inputs left out" : "") + " threads " + std::to_string(threads));
    }
}

// Threads with a sequence each get what they would alone; of those that share one, each call is whole or refused.
void test_threads() {
  const std::vector<int32_t> tokens = random_tokens();
  for (int threads : {1, 3})
    for (const auto& m : models(threads)) {
      constexpr int kCallers = 3, kCalls = 20;
      const std::vector<int32_t> few(tokens.begin(), tokens.begin() + 25);
      const std::vector<float> expected = run(*m, few, true);
      std::vector<int> same(kCallers);
      std::atomic<int> refused{0}, running{kCallers};
      Sequence shared(*m, kContext);
      std::vector<std::thread> callers;
      for (int c = 0; c < kCallers; ++c)
        callers.emplace_back([&, c] {
          Sequence own(*m, kContext - c);
          same[c] = run(own, few, true) == expected;
          for (--running; running > 0;) std::this_thread::yield();  // so that calls do meet
          std::vector<float> logits(kVocab);
          for (int calls = 0; calls < kCalls;) try {
              shared.forward(&few[0], 1, false, logits.data());
              ++calls;
              shared.stats();
            } catch (const Busy&) {
              ++refused;
              std::this_thread::yield();
            }
        });
      for (std::thread& t : callers) t.join();
      const std::string what = " mode " + std::to_string(int(m->config.mode)) + " threads " + std::to_string(threads);
      expect(std::count(same.begin(), same.end(), 1) == kCallers, "a sequence per thread," + what);
      expect(shared.position() == kCallers * kCalls && shared.stats().tokens == kCallers * kCalls,
             "one sequence for all threads," + what + ": " + std::to_string(refused) + " refused");
    }
}

// A caller that comes back at once waits for those who have come meanwhile.
void test_turns() {
  Turns turns;
  std::string order;
  turns.lock();
  std::vector<std::thread> others;
  for (int i = 0; i < 3; ++i) {
    others.emplace_back([&, i] {
      const std::lock_guard<Turns> turn(turns);
      order += char('a' + i);
    });
    while (turns.callers() < 2 + i) std::this_thread::yield();
  }
  turns.unlock();
  turns.lock();
  order += 'z';
  turns.unlock();
  for (std::thread& t : others) t.join();
  expect(order == "abcz", "turns in the order of callers: " + order);
}

// A sequence whose call waits for its turn refuses all others.
void test_busy() {
  const Weights w(Type::F32);
  const auto m = make(w, Mode::Exact, 3, kernels(), 0);
  Sequence s(*m, kContext);
  const std::vector<int32_t> tokens = random_tokens();
  std::vector<float> logits(kVocab), other(kVocab);
  m->turns.lock();
  std::thread caller([&] { s.forward(tokens.data(), 1, false, logits.data()); });
  while (m->turns.callers() < 2) std::this_thread::yield();
  int refused = 0;
  const auto refuses = [&](auto call) {
    try {
      call();
    } catch (const Busy&) {
      ++refused;
    }
  };
  refuses([&] { s.forward(tokens.data(), 1, false, other.data()); });
  refuses([&] { s.stats(); });
  refuses([&] { s.reset_stats(); });
  refuses([&] { s.set_position(0); });
  refuses([&] { s.set_audit(true); });
  m->turns.unlock();
  caller.join();
  expect(refused == 5 && s.position() == 1 && s.stats().tokens == 1, "a sequence in use refuses calls: " + std::to_string(refused));
}

// A forked process has none of the threads: calls say so, and nothing waits for them.
void test_fork() {
  const std::vector<int32_t> tokens = random_tokens();
  const Weights w(Type::F32);
  for (int threads : {1, 3}) {
    auto m = make(w, Mode::Exact, threads, kernels(), 0);
    auto s = std::make_unique<Sequence>(*m, kContext);
    const std::vector<float> expected = run(*s, tokens, false);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      int refused = 0;
      for (int i = 0; i < 2; ++i) try {
          if (i) s->stats();
          else run(*s, tokens, false);
        } catch (const Forked&) {
          ++refused;
        }
      s.reset();
      m.reset();
      _exit(refused == 2 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "refused after a fork, threads " + std::to_string(threads));
    s->set_position(0);
    expect(run(*s, tokens, false) == expected, "and as before where it was forked from, threads " + std::to_string(threads));
  }
}

void test_team() {
  for (int threads : {1, 2, 3, 8})
    for (int round = 0; round < 4; ++round) {
      Team team(threads);
      std::vector<int> counts(threads * 64);
      for (int region = 0; region < 10; ++region)
        team.run([&](int t) {
          for (int step = 0; step < 5; ++step) {
            ++counts[t * 64];
            team.barrier();
            // Everyone has done this step, and nobody the next one.
            for (int other = 0; other < threads; ++other)
              if (counts[other * 64] != region * 5 + step + 1) std::abort();
            team.barrier();
          }
        });
    }
  expect(true, "teams of 1 to 8 threads stay in step");
}

// Every index once, whatever the threads' pace, in calls that follow each other with no barrier between them.
void test_sharing() {
  for (int threads : {1, 2, 3, 8}) {
    Team team(threads);
    constexpr int kCalls = 40, kMost = 500;
    std::vector<int> begun(kCalls * kMost);
    bool in_range = true;
    team.run([&](int t) {
      for (int call = 0; call < kCalls; ++call) {
        const int n = call * 37 % kMost;
        team.share(t, n, 1 + call % 5, [&](int first, int last) {
          if (first < 0 || first >= last || last > n) in_range = false;
          for (int i = first; i < last; ++i) ++begun[call * kMost + i];
          if (t == call % threads)  // a slow thread
            for (volatile int wait = 0; wait < 20000;) wait = wait + 1;
        });
      }
    });
    bool once = true;
    for (int call = 0; call < kCalls; ++call)
      for (int i = 0; i < kMost; ++i) once = once && begun[call * kMost + i] == (i < call * 37 % kMost);
    expect(in_range && once, "all is shared out once, threads " + std::to_string(threads));
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_team();
  test_sharing();
  test_models();
  test_prefetches();
  test_long_rows();
  test_structures();
  test_parts();
  test_inputs();
  test_input_rules();
  test_sequences();
  test_threads();
  test_turns();
  test_busy();
  test_fork();
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}

// The engine without Python, for the sanitizers: random models of every type and mode on 1 to 4 threads, in blocks and
// token by token, every ISA that the machine runs against plain C++; and the thread team on its own, started and stopped many times.
// Prints one line per case; exits with 1 if any fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "model.h"

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
  if (is_quantised(type)) {
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

constexpr int kLayers = 2, kModel = 96, kFf = 200, kHeads = 6, kKvHeads = 2, kDim = 16, kVocab = 70, kRank = 32,
              kContext = 200;

struct Weights {
  Type type;
  std::vector<uint8_t> embedding, positions, q, k, v, o, gate, up, down, down_t, fc1, fc2;
  explicit Weights(Type t) : type(t) {
    // d_ff need not be a multiple of 32 where down is stored by neurons; the dense form then falls back to F16.
    embedding = random_matrix(t, kVocab, kModel);
    positions = random_matrix(t, kContext, kModel);
    q = random_matrix(t, kHeads * kDim, kModel);
    k = random_matrix(t, kKvHeads * kDim, kModel);
    v = random_matrix(t, kKvHeads * kDim, kModel);
    o = random_matrix(t, kModel, kHeads * kDim);
    gate = random_matrix(t, kFf, kModel);
    up = random_matrix(t, kFf, kModel);
    down = random_matrix(Type::F16, kModel, kFf);
    down_t = random_matrix(t, kFf, kModel);
    fc1 = random_matrix(t, kRank, kModel);
    fc2 = random_matrix(t, kFf, kRank);
  }
};

// What a Llama lacks: LayerNorm, biases, learned positions, norms of heads, a window, a parallel FFN without a gate.
void add_parts(Model& m, const Weights& w) {
  std::normal_distribution<float> normal(0, 0.3f);
  std::mt19937 same(11);  // the same parts for every engine that is compared
  const auto fill = [&](std::vector<float>& v, int n) {
    for (int i = 0; i < n; ++i) v.push_back(normal(same));
  };
  m.positions = m.add_panel(w.type, w.positions.data(), kContext, kModel, nullptr);
  m.rope_frequency.clear();
  fill(m.output_norm.bias, kModel);
  for (Layer& l : m.layers) {
    for (NormWeights* norm : {&l.attn_norm, &l.ffn_norm}) fill(norm->bias, kModel);
    fill(l.q_bias, kHeads * kDim);
    fill(l.k_bias, kKvHeads * kDim);
    fill(l.v_bias, kKvHeads * kDim);
    fill(l.o_bias, kModel);
    fill(l.gate_bias, kFf);
    l.gate_bias.resize(round_up(kFf, kLanes));
    fill(l.down_bias, kModel);
    l.q_norm.assign(kDim, 1.1f);
    l.k_norm.assign(kDim, 0.9f);
  }
  m.layers[0].window = 9;
}

std::unique_ptr<Model> make(const Weights& w, Mode mode, int threads, const Kernels& k, float threshold, bool llama = true) {
  Config c{kLayers, kModel, kFf, kHeads, kKvHeads, kDim, kVocab, kContext, 1e-5f, Activation::Relu, mode};
  c.layer_norm = c.parallel = !llama;
  c.gated = llama;
  auto m = std::make_unique<Model>(c, threads, size_t(8) << 20, k);
  m->embedding = m->head = m->add_panel(w.type, w.embedding.data(), kVocab, kModel, nullptr);
  m->output_norm.weight.assign(kModel, 1.0f);
  for (int i = 0; i < kDim / 2; ++i) m->rope_frequency.push_back(std::pow(10000.0f, -float(i) / (kDim / 2)));
  for (Layer& l : m->layers) {
    l.attn_norm.weight.assign(kModel, 1.0f);
    l.ffn_norm.weight.assign(kModel, 1.0f);
    l.q = m->add_panel(w.type, w.q.data(), kHeads * kDim, kModel, nullptr);
    l.k = m->add_panel(w.type, w.k.data(), kKvHeads * kDim, kModel, nullptr);
    l.v = m->add_panel(w.type, w.v.data(), kKvHeads * kDim, kModel, nullptr);
    l.o = m->add_panel(w.type, w.o.data(), kModel, kHeads * kDim, nullptr);
    if (mode != Mode::Predicted) l.gate = m->add_panel(w.type, w.gate.data(), kFf, kModel, nullptr);
    if (mode == Mode::Dense) {
      if (llama) l.up = m->add_panel(w.type, w.up.data(), kFf, kModel, nullptr);
      l.down = m->add_panel(Type::F16, w.down.data(), kModel, kFf, nullptr);
    } else {
      m->add_bundles(l, mode == Mode::Predicted ? w.gate.data() : nullptr, w.type, llama ? w.up.data() : nullptr, w.type, w.down_t.data(),
                     w.type);
    }
    if (mode == Mode::Predicted) {
      l.fc1 = m->add_panel(w.type, w.fc1.data(), kRank, kModel, nullptr);
      l.fc2 = m->add_panel(w.type, w.fc2.data(), kFf, kRank, nullptr);
      l.predictor_threshold = threshold;
      l.hot.assign(round_up(kFf, kLanes) / kLanes, 0x0101);
    }
  }
  if (!llama) add_parts(*m, w);
  return m;
}

std::vector<float> run(Model& m, const std::vector<int32_t>& tokens, bool by_token) {
  std::vector<float> logits(tokens.size() * kVocab);
  if (!by_token) m.forward(tokens.data(), int(tokens.size()), true, logits.data());
  else for (size_t i = 0; i < tokens.size(); ++i) m.forward(&tokens[i], 1, false, &logits[i * kVocab]);
  return logits;
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
  std::vector<int32_t> tokens;
  for (int i = 0; i < 70; ++i) tokens.push_back(int32_t(rng() % kVocab));
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
            m->audit = mode == Mode::Predicted && threads == 3;
            const double e = error(run(*m, by_token ? few : tokens, by_token), expected);
            expect(e < (is_quantised(type) ? 0.05 : 1e-3),
                   std::string(types[int(type)]) + " " + modes[int(mode)] + " " + *isa + " threads " + std::to_string(threads) +
                       (by_token ? " by token" : " block") + ": " + std::to_string(e));
          }
      }
    const auto none = make(w, Mode::Predicted, 2, kernels(), 1e9f);
    run(*none, tokens, false);
    const int64_t hot = 2 * (kFf / kLanes) + 1;  // 0x0101 in every full group; the last group has 8 neurons
    const int64_t after_first = int64_t(tokens.size()) - 1;
    expect(none->stats()[0].predicted == kFf + hot * after_first, "position 0 in full, then hot neurons only");
  }
}

// The other structures: threads, blocks and kernels against plain C++ on one thread.
void test_structures() {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 70; ++i) tokens.push_back(int32_t(rng() % kVocab));
  for (Type type : {Type::F32, Type::Q4_0}) {
    const Weights w(type);
    for (Mode mode : {Mode::Dense, Mode::Exact, Mode::Predicted}) {
      const std::vector<float> expected = run(*make(w, mode, 1, kernels("generic"), -1e9f, false), tokens, false);
      for (int threads : {1, 3})
        for (bool by_token : {false, true}) {
          const auto m = make(w, mode, threads, kernels(), -1e9f, false);
          m->audit = mode == Mode::Predicted;
          const double e = error(run(*m, tokens, by_token), expected);
          expect(e < (is_quantised(type) ? 0.05 : 1e-3), "LayerNorm, biases, window, mode " + std::to_string(int(mode)) +
                                                              " threads " + std::to_string(threads) +
                                                              (by_token ? " by token: " : " block: ") + std::to_string(e));
        }
    }
  }
}

// Layers one by one, and the neurons of a layer in two parts, against all at once on one thread.
void test_parts() {
  const int tokens = 20;
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> input(size_t(tokens) * kModel);
  for (float& v : input) v = normal(rng);
  std::vector<int32_t> all, even, odd;
  for (int i = 0; i < kFf; ++i) {
    all.push_back(i);
    (i % 2 ? odd : even).push_back(i);
  }
  const std::vector<uint64_t> every(kFf, (uint64_t(1) << tokens) - 1);
  const Weights w(Type::F32);
  for (int threads : {1, 3})
    for (int n : {1, tokens}) {
      const auto m = make(w, Mode::Predicted, threads, kernels(), -1e9f), one = make(w, Mode::Predicted, 1, kernels(), -1e9f);
      m->layers[0].n_neurons = one->layers[0].n_neurons = kFf;
      const std::string what = " threads " + std::to_string(threads) + " tokens " + std::to_string(n);
      std::vector<float> together(size_t(n) * kModel), first = together, second = together;
      const int64_t fired = one->run_neurons(0, input.data(), n, all.data(), every.data(), kFf, together.data());
      const int64_t halves = m->run_neurons(0, input.data(), n, even.data(), every.data(), kFf / 2, first.data()) +
                             m->run_neurons(0, input.data(), n, odd.data(), every.data(), kFf / 2, second.data());
      for (size_t i = 0; i < first.size(); ++i) first[i] += second[i];
      expect(halves == fired && error(first, together) < 1e-5, "neurons in two parts" + what);
      m->run_neurons(0, input.data(), n, all.data(), every.data(), 0, first.data());
      expect(std::all_of(first.begin(), first.end(), [](float v) { return v == 0; }), "no neurons" + what);

      std::vector<float> x(input.begin(), input.begin() + size_t(n) * kModel), y = x;
      one->run_layers(x.data(), n, 0, kLayers, 0);
      for (int l = 0; l < kLayers; ++l) m->run_layers(y.data(), n, l, l + 1, 0);
      expect(error(y, x) < 1e-4, "layers one by one" + what);
    }
}

// Attention held by input: all inputs, or the larger half; threads, blocks and kernels against plain C++ on one thread.
void test_inputs() {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 70; ++i) tokens.push_back(int32_t(rng() % kVocab));
  for (Type type : {Type::F32, Type::Q8_0, Type::Q4_0}) {
    const Weights w(type);
    const auto q = random_matrix(type, kModel, kHeads * kDim), k = random_matrix(type, kModel, kKvHeads * kDim),
               v = random_matrix(type, kModel, kKvHeads * kDim), o = random_matrix(type, kHeads * kDim, kModel);
    const auto by_input = [&](int threads, const Kernels& kernels, Mode mode, float share, bool llama) {
      auto m = make(w, mode, threads, kernels, mode == Mode::Predicted ? -1e9f : 0, llama);
      for (Layer& l : m->layers) {
        l.q = l.k = l.v = l.o = {};
        l.qkv_inputs = m->add_input_rows(
            kModel, {{type, q.data(), kHeads * kDim}, {type, k.data(), kKvHeads * kDim}, {type, v.data(), kKvHeads * kDim}});
        l.o_inputs = m->add_input_rows(kHeads * kDim, {{type, o.data(), kModel}});
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
            expect(e < (is_quantised(type) ? 0.3 : 1e-3),
                   "by input, type " + std::to_string(int(type)) + " mode " + std::to_string(int(mode)) + " threads " +
                       std::to_string(threads) + (by_token ? " by token: " : " block: ") + std::to_string(e));
          }
      }
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
  test_structures();
  test_parts();
  test_inputs();
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}

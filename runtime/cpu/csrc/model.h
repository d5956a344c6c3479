// A decoder-only model bound to its packed weights, and the team of threads that computes with them.
//
// It knows no text: what a text has of its own is in sequence.h. Once a sequence is made of it, nothing here changes but the
// memory that is worked in, by one sequence at a time.
//
// Every thread of the team runs the same function; what it owns is a contiguous share of rows, heads or neurons. With
// one token, what all threads need (norms, quantized activations, the residual stream) is computed by each on its own
// copy, which is cheaper than handing it over.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "threads.h"

namespace hotcold {

enum class Mode : int { Dense, Exact, Predicted };

constexpr int kMaxGroup = 128;  // query heads per key-value head
constexpr int kMaxBlock = 64;  // tokens per pass over the weights; one bit each in a neuron's token mask

struct Config {
  int n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, n_vocab;
  float norm_eps;
  Rule rule;
  Mode mode;
  bool layer_norm = false;  // LayerNorm with bias instead of RMSNorm
  bool parallel = false;    // attention and FFN both read the layer's input (Falcon)
  bool gated = true;        // else an FFN is act(gate x + bias), without up (OPT, Falcon)
};

struct NormWeights {
  std::vector<float> weight, bias;  // bias: LayerNorm only
};

struct Panel {
  Type type = Type::F32;
  int rows = 0, cols = 0;
  const uint8_t* data = nullptr;
  size_t bytes() const { return data ? panel_bytes(type, rows, cols) : 0; }
};

// Rows of one kind (gate, up or down) inside the neuron bundles.
struct RowKind {
  Type type = Type::F32;
  size_t at = 0;     // offset inside the bundle
  size_t bytes = 0;  // 0: not in the bundle
};

// Matrices with the same input, held by input: what one input adds to their outputs lies side by side.
struct InputRows {
  struct Part {
    RowKind row;   // as a down row
    int outputs;
    int first;     // place of its outputs, each part padded to 128, among those of all parts
  };
  std::vector<Part> parts;
  const uint8_t* data = nullptr;
  int inputs = 0;
  size_t bytes = 0, stride = 0;  // of one input: without and with padding to cache lines

  const uint8_t* row(int input) const { return data + size_t(input) * stride; }
  int width() const { return parts.empty() ? 0 : parts.back().first + round_up(parts.back().outputs, 128); }
};

// Where a layer may leave inputs out: at what q, k and v read, what o reads, what gate and up read, and what down reads.
enum class Site : int { Qkv, O, GateUp, Down };
constexpr int kSites = 4;
inline constexpr const char* kSiteNames[kSites] = {"qkv", "o", "gate_up", "down"};

struct InputSite {
  std::vector<float> least;  // input i counts iff |x[i]| >= least[i]; empty: no such rule
  InputRows rows;            // the matrices by input, where they are held so instead of as panels
};

// A transposed matrix in GGUF's form.
struct InputPart {
  Type type;
  const uint8_t* data;
  int outputs;
};

struct Layer {
  NormWeights attn_norm, ffn_norm;
  Panel q, k, v, o;
  std::array<InputSite, kSites> inputs;
  std::vector<float> q_bias, k_bias, v_bias, o_bias;  // empty: none
  std::vector<float> q_norm, k_norm;                  // [head_dim], RMSNorm of each head before the rotation; empty: none
  int window = 0;                                     // positions that a query sees, its own included; 0: all
  Panel gate, up, down;            // dense mode; gate alone in exact mode
  const uint8_t* bundles = nullptr;
  size_t bundle_stride = 0;
  int n_neurons = 0;               // held in bundles, where only a part is (parts.cpp)
  RowKind gate_row, up_row, down_row;
  std::vector<float> gate_bias;    // [round_up(d_ff, 16)], or [n_neurons]; empty: none
  std::vector<float> down_bias;
  Panel fc1, fc2;                  // predictor: fc2 · act(fc1 · x) + bias
  std::vector<float> fc2_bias;     // [round_up(d_ff, 16)]; empty: none
  bool predictor_relu = true;      // between the two, else nothing
  bool predictor_normed = false;   // x is the FFN's input, else the residual stream before its norm
  std::vector<uint16_t> hot;       // per 16 neurons: bits of those that are always computed
  float predictor_threshold = 0;
  std::vector<float> firing{FLT_MIN};  // thresholds: one for all neurons, or as many as gate_bias has

  const InputSite& site(Site which) const { return inputs[int(which)]; }
  InputSite& site(Site which) { return inputs[int(which)]; }
  Thresholds thresholds() const { return {firing.size() > 1 ? firing.data() : nullptr, firing[0]}; }
  const uint8_t* bundle(int neuron) const { return bundles + size_t(neuron) * bundle_stride; }
  // What a neuron whose gate fired is read from next.
  const RowKind& after_gate() const { return up_row.bytes ? up_row : down_row; }
};

class Model {
 public:
  struct Buffers;  // buffers.h

  Model(const Config& config, int threads, size_t weight_bytes, const Kernels& kernels);
  ~Model();

  const Config config;
  const Kernels& k;
  std::vector<Layer> layers;
  Panel embedding, head;
  Panel positions;  // learned positions [n_positions, d_model], or none
  NormWeights output_norm;
  std::vector<float> rope_frequency;  // [rope_dim / 2], radians per position
  float rope_scale = 1;               // of sine and cosine (YaRN's attention factor)
  double input_sparsity = 0;          // share of the attention matrices' inputs that are left out, where they are held by input

  // What sequences compute with, one after the other.
  mutable Team team;
  mutable Turns turns;
  // The memory that they work in, with room for the scores of `positions` of a cache.
  Buffers& buffers(int positions) const;

  // Packs a GGUF matrix [rows, cols] on all threads; `order` as in pack_panel.
  Panel add_panel(Type type, const uint8_t* src, int rows, int cols, const int32_t* order);
  // Packs transposed matrices, GGUF rows of [inputs, outputs of each part].
  InputRows add_input_rows(int inputs, const std::vector<InputPart>& parts);
  // Packs the rows of all neurons of a layer; gate may be null (exact mode keeps gates in a panel), and so may up.
  void add_bundles(Layer& layer, const uint8_t* gate, Type gate_type, const uint8_t* up, Type up_type,
                   const uint8_t* down, Type down_type);

  // Packs the rows of `n` neurons of a layer, numbered from 0; the layer's other neurons are not held.
  void add_neurons(Layer& layer, int n, const uint8_t* gate, Type gate_type, const uint8_t* up, Type up_type,
                   const uint8_t* down, Type down_type);
  size_t weight_bytes() const { return arena_.used(); }

 private:
  Arena arena_;
  mutable std::unique_ptr<Buffers> buffers_;
};

}  // namespace hotcold

// One text that a model computes: the keys and values of its tokens, its position, and what it has counted.
//
// Sequences of one model take turns, each call being one turn: from one thread or from several, they do not meet.
#pragma once
#include <array>
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

#include "block.h"
#include "model.h"

namespace hotcold {

// A sequence that another thread is using.
struct Busy : std::exception {
  const char* what() const noexcept override { return "a sequence that another thread is using"; }
};

struct LayerStats {
  int64_t fired = 0, predicted = 0, missed = 0;
};

// Of one site in all layers: bytes read, or needed, of matrices held by input, and inputs that there were and that counted.
struct InputStats {
  int64_t bytes = 0, seen = 0, kept = 0;
};

// What one thread counts; apart from the others', as all of them write at once.
struct alignas(64) Counts {
  explicit Counts(int n_layers) : layers(n_layers) {}
  InputStats& site(Site which) { return inputs[int(which)]; }
  Block<LayerStats> layers;
  std::array<InputStats, kSites> inputs{};
};

// All calls throw Busy and Forked where those hold.
class Sequence {
 public:
  // Memory is taken by the first call that computes.
  Sequence(const Model& model, int n_ctx);

  const Model& model;
  const int n_ctx;

  // Runs tokens [0, n) at the end of the cache. Logits of the last one, or of all, go to `logits` [.., n_vocab].
  void forward(const int32_t* tokens, int n, bool all_logits, float* logits);
  int position() const { return position_.load(std::memory_order_relaxed); }
  void set_position(int position);  // at most what is in the cache, but for tests
  bool audit() const { return audit_.load(std::memory_order_relaxed); }
  void set_audit(bool on);  // predicted mode: also count what the predictor missed

  struct Stats {
    int64_t tokens;
    std::vector<LayerStats> layers;
    std::array<InputStats, kSites> inputs{};
  };
  Stats stats();
  void reset_stats();

  // ---- parts of a model whose other parts are computed elsewhere (parts.cpp); they leave `position` alone
  // Layers [first, last) on the residual stream x [n, d_model], in place, of tokens at `first_position`.
  void run_layers(float* x, int n, int first, int last, int first_position);
  // y [n, d_model] = act(gate) * up over `count` neurons of layer l, through down. `normed` [n, d_model] is the FFN's
  // input; `tokens` says for n > 1 which tokens a neuron is wanted for. n is at most kMaxBlock. Returns how many fired.
  int64_t run_neurons(int l, const float* normed, int n, const int32_t* index, const uint64_t* tokens, int count, float* y);

 private:
  friend struct Pass;
  // A call's hold on this sequence.
  class Hold {
   public:
    explicit Hold(Sequence& s);
    ~Hold() { s_.held_.clear(std::memory_order_release); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    Sequence& s_;
  };
  // And on what all sequences of the model compute with.
  struct Use {
    explicit Use(Sequence& s) : hold(s), turn(s.model.turns) {}
    Hold hold;
    std::lock_guard<Turns> turn;
  };

  void cache();  // takes the memory for keys and values
  int tiles() const { return round_up(n_ctx, kLanes) / kLanes; }

  Block<uint16_t> keys_;    // [layer][kv head][tile][dim][16]
  Block<uint16_t> values_;  // [layer][kv head][position][dim]
  std::vector<Counts> counts_;  // per thread
  int64_t tokens_run_ = 0;
  std::atomic<int> position_{0};
  std::atomic<bool> audit_{false};
  std::atomic_flag held_;
};

}  // namespace hotcold

// Seeded random weights for any configuration, of a scale at which a model behaves like a trained one: activations stay
// finite, gates move, the recurrent state decays. For benchmarks, planning and tests without a checkpoint.
//
// Matrices are views into a shared pool of random numbers, each at a place drawn from its name: memory and time are
// those of the largest matrix, whatever the size of the model. Norms, gates and convolutions have numbers of their own.
// Invariant: a tensor's numbers depend on configuration, seed and name only, not on threads or the order of views.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "base/thread_pool.h"
#include "compile/model_config.h"
#include "compile/weight_source.h"
#include "model/tensor_list.h"

namespace tokenspeed::model {

class DummyWeights : public compile::WeightSource {
 public:
  // Matrices are bfloat16, or FP8 blocks where the official FP8 releases have them and config.fp8_blocks is set.
  // Errors: those of build_graph; resource_exhausted when there is no memory for the largest matrix.
  static Result<std::unique_ptr<DummyWeights>> create(const compile::ModelConfig& config, uint64_t seed = 0);

  bool has(const std::string& name) const override;
  Result<compile::WeightView> view(const std::string& name) const override;

 private:
  // Random elements of one kind; a matrix takes a run of them.
  template <typename Element>
  struct Pool {
    std::unique_ptr<Element[]> elements;
    int64_t size = 0;
  };

  // What the pools must serve.
  struct Demand {
    int64_t largest = 0;
    int64_t total = 0;
    void add(int64_t elements, int64_t count);
    int64_t pool_size() const;
  };

  DummyWeights(std::string model, uint64_t seed) : model_(std::move(model)), seed_(seed) {}
  Status fill_pools(bool fp8_blocks);
  void fill_vector(const TensorSpec& spec);
  const TensorSpec* find(const std::string& name) const;
  template <typename Element>
  const Element* place(const Pool<Element>& pool, const std::string& name, int64_t elements) const;

  const std::string model_;
  const uint64_t seed_;
  bool fp8_blocks_ = false;
  std::unordered_map<std::string, TensorSpec> tensors_;
  std::unordered_map<std::string, std::vector<float>> float_vectors_;
  std::unordered_map<std::string, std::vector<BFloat16>> bfloat16_vectors_;
  Pool<BFloat16> bfloat16_pool_;
  Pool<uint8_t> fp8_pool_;
  Pool<float> scale_pool_;
};

}  // namespace tokenspeed::model

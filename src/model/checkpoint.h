// The weights of a checkpoint directory under their canonical names, read from the mapped files.
// Whatever the files use - either name prefix, one file or shards, stacked or single experts, tied or separate heads -
// the names asked for are the same. Nothing is copied, except FP8 block scales that are not float32 and tensors that
// lie unaligned in their file: those are converted at the first view and kept.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "compile/weight_source.h"
#include "model/checkpoint_files.h"

namespace tokenspeed::model {

class Checkpoint : public compile::WeightSource {
 public:
  // With `tied`, "lm_head.weight" is the embedding where the files have none of their own. Logs how many vision tensors
  // are left alone. Errors: those of open_checkpoint_files; data_loss when two file names have one canonical name or an
  // FP8 matrix lacks its block scales.
  static Result<std::unique_ptr<Checkpoint>> open(const Directory& directory, bool tied);

  bool has(const std::string& name) const override;
  Result<compile::WeightView> view(const std::string& name) const override;
  // The shape view() will give, without touching the tensor.
  Result<std::vector<int64_t>> shape(const std::string& name) const;
  // Any matrix in FP8 blocks.
  bool has_fp8() const { return has_fp8_; }

 private:
  struct Tensor {
    FileTensor data;
    FileTensor scale;  // of FP8
  };
  // A whole tensor, or `rows` of one expert in a stacked one.
  struct Place {
    const Tensor* tensor = nullptr;
    uint64_t byte_offset = 0;
    std::vector<int64_t> shape;
  };

  Status add(const FileTensor& tensor);
  Status attach_scales();
  const Tensor* find(const std::string& name) const;
  Result<Place> locate(const std::string& name) const;
  bool locate_expert(const std::string& name, Place* place) const;
  Status missing(const std::string& name) const;
  const std::byte* aligned_data(const FileTensor& tensor) const;
  const float* float_scale(const FileTensor& scale) const;

  std::string directory_;
  bool tied_ = false;
  bool has_fp8_ = false;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::unordered_map<std::string, Tensor> tensors_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<const SafetensorsTensor*, std::vector<uint64_t>> copies_;
  mutable std::unordered_map<const SafetensorsTensor*, std::vector<float>> scales_;
};

}  // namespace tokenspeed::model

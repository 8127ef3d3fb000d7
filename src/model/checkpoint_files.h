// Which safetensors files make up a checkpoint directory, and which tensor is read from which.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/directory.h"
#include "base/status.h"
#include "model/safetensors.h"

namespace tokenspeed::model {

struct FileTensor {
  std::string name;  // as in the file
  const SafetensorsFile* file = nullptr;
  const SafetensorsTensor* tensor = nullptr;
};

struct CheckpointFiles {
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  std::vector<FileTensor> tensors;  // point into `files`
};

// Opens directory/model.safetensors, or all shards that directory/model.safetensors.index.json names, and begins to
// read them ahead. Errors: not_found when there is neither or shards are missing (all are named); data_loss when the
// index is broken, leads out of the directory or names tensors that its shards do not hold; those of
// SafetensorsFile::open.
Result<CheckpointFiles> open_checkpoint_files(const Directory& directory);

}  // namespace tokenspeed::model

#include "model/checkpoint.h"

#include <cstring>
#include <utility>

#include "base/log.h"
#include "base/shape.h"
#include "model/fp8_blocks.h"
#include "model/tensor_names.h"

namespace tokenspeed::model {
namespace {

constexpr std::string_view kScaleSuffix = "_scale_inv";

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

std::string in_file(const FileTensor& tensor) {
  return "tensor '" + tensor.name + "' of '" + tensor.file->path() + "'";
}

Status check_scale(const FileTensor& data, const FileTensor& scale) {
  const std::vector<int64_t>& shape = data.tensor->shape;
  if (shape.size() != 2) {
    return unimplemented(in_file(data) + " is FP8 with shape " + shape_text(shape) + "; only matrices are supported");
  }
  const std::vector<int64_t> wanted = {fp8_blocks(shape[0]), fp8_blocks(shape[1])};
  if (scale.tensor->shape == wanted && is_float(scale.tensor->dtype)) return {};
  return data_loss(in_file(scale) + " is " + std::string(dtype_name(scale.tensor->dtype)) + " " +
                   shape_text(scale.tensor->shape) + "; the scales of " + shape_text(shape) +
                   " in 128x128 blocks must be bfloat16 or float32 " + shape_text(wanted));
}

}  // namespace

Result<std::unique_ptr<Checkpoint>> Checkpoint::open(const Directory& directory, bool tied) {
  TS_ASSIGN_OR_RETURN(CheckpointFiles opened, open_checkpoint_files(directory));
  auto checkpoint = std::make_unique<Checkpoint>();
  checkpoint->directory_ = directory.path();
  checkpoint->tied_ = tied;
  checkpoint->files_ = std::move(opened.files);
  int64_t vision = 0;
  for (const FileTensor& tensor : opened.tensors) {
    if (is_vision_tensor(tensor.name)) {
      ++vision;
    } else {
      TS_RETURN_IF_ERROR(checkpoint->add(tensor));
    }
  }
  TS_RETURN_IF_ERROR(checkpoint->attach_scales());
  if (vision > 0)
    spdlog::info("'{}': {} vision tensors are skipped, the engine is text-only", directory.path(), vision);
  return checkpoint;
}

Status Checkpoint::add(const FileTensor& tensor) {
  const auto [entry, added] = tensors_.try_emplace(std::string(canonical_name(tensor.name)), Tensor{tensor, {}});
  if (added) return {};
  return data_loss(in_file(entry->second.data) + " and " + in_file(tensor) + " are the same weight; one must go");
}

Status Checkpoint::attach_scales() {
  for (auto& [name, tensor] : tensors_) {
    if (tensor.data.tensor->dtype != DType::kFloat8E4M3) continue;
    const auto scale = tensors_.find(name + std::string(kScaleSuffix));
    if (scale == tensors_.end()) {
      return data_loss(in_file(tensor.data) + " is FP8, but '" + tensor.data.name + std::string(kScaleSuffix) +
                       "' with its block scales is not there");
    }
    TS_RETURN_IF_ERROR(check_scale(tensor.data, scale->second.data));
    tensor.scale = scale->second.data;
    has_fp8_ = true;
  }
  return {};
}

const Checkpoint::Tensor* Checkpoint::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

// Stacked experts: gate_up_proj [experts, 2 width, hidden], gate rows first, and down_proj [experts, hidden, width].
bool Checkpoint::locate_expert(const std::string& name, Place* place) const {
  const auto expert = parse_expert_tensor(name);
  if (!expert) return false;
  const bool down = expert->projection == "down_proj";
  const bool up = expert->projection == "up_proj";
  if (!down && !up && expert->projection != "gate_proj") return false;
  const Tensor* stacked = find(std::string(expert->prefix) + (down ? "down_proj" : "gate_up_proj"));
  if (!stacked) return false;
  const std::vector<int64_t>& shape = stacked->data.tensor->shape;
  if (shape.size() != 3 || expert->expert >= shape[0] || (!down && shape[1] % 2 != 0)) return false;
  const int64_t rows = down ? shape[1] : shape[1] / 2;
  const int64_t first_row = expert->expert * shape[1] + (up ? rows : 0);
  const int64_t row_bytes = shape[2] * static_cast<int64_t>(dtype_size(stacked->data.tensor->dtype));
  *place = {stacked, static_cast<uint64_t>(first_row * row_bytes), {rows, shape[2]}};
  return true;
}

Status Checkpoint::missing(const std::string& name) const {
  const std::string where = files_.size() == 1 ? "'" + files_.front()->path() + "' does not hold it"
                                               : "none of the " + std::to_string(files_.size()) +
                                                     " safetensors files of '" + directory_ + "' holds it";
  return not_found("tensor '" + name + "' is missing: " + where);
}

Result<Checkpoint::Place> Checkpoint::locate(const std::string& name) const {
  const Tensor* tensor = find(name);
  if (!tensor && tied_ && name == "lm_head.weight") tensor = find("embed_tokens.weight");
  Place place;
  if (tensor) {
    place = {tensor, 0, tensor->data.tensor->shape};
  } else if (!locate_expert(name, &place)) {
    return missing(name);
  }
  const DType dtype = place.tensor->data.tensor->dtype;
  if (is_float(dtype) || dtype == DType::kFloat8E4M3) return place;
  return unimplemented(in_file(place.tensor->data) + " has dtype " + std::string(dtype_name(dtype)) +
                       "; weights must be float32, float16, bfloat16 or float8_e4m3");
}

bool Checkpoint::has(const std::string& name) const { return locate(name).ok(); }

Result<std::vector<int64_t>> Checkpoint::shape(const std::string& name) const {
  TS_ASSIGN_OR_RETURN(Place place, locate(name));
  return std::move(place.shape);
}

Result<compile::WeightView> Checkpoint::view(const std::string& name) const {
  TS_ASSIGN_OR_RETURN(Place place, locate(name));
  const Tensor& tensor = *place.tensor;
  compile::WeightView view;
  view.data = aligned_data(tensor.data) + place.byte_offset;
  view.dtype = tensor.data.tensor->dtype;
  view.shape = std::move(place.shape);
  if (tensor.scale.tensor) view.scale = float_scale(tensor.scale);
  return view;
}

const std::byte* Checkpoint::aligned_data(const FileTensor& tensor) const {
  const std::byte* data = tensor.file->data(*tensor.tensor);
  if (reinterpret_cast<uintptr_t>(data) % dtype_size(tensor.tensor->dtype) == 0) return data;
  const std::lock_guard lock(mutex_);
  const auto [entry, added] = copies_.try_emplace(tensor.tensor);
  if (added) {
    entry->second.resize((tensor.tensor->size + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    std::memcpy(entry->second.data(), data, tensor.tensor->size);
  }
  return reinterpret_cast<const std::byte*>(entry->second.data());
}

const float* Checkpoint::float_scale(const FileTensor& scale) const {
  const std::byte* data = aligned_data(scale);
  if (scale.tensor->dtype == DType::kFloat32) return reinterpret_cast<const float*>(data);
  const std::lock_guard lock(mutex_);
  const auto [entry, added] = scales_.try_emplace(scale.tensor);
  if (added) {
    const int64_t rows = scale.tensor->shape[0];
    entry->second.resize(static_cast<size_t>(rows * scale.tensor->shape[1]));
    compile::read_rows_as_float({data, scale.tensor->dtype, scale.tensor->shape, nullptr}, 0, rows,
                                entry->second.data());
  }
  return entry->second.data();
}

}  // namespace tokenspeed::model

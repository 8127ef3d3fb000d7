#include "model/checkpoint_files.h"

#include <simdjson.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "base/mapped_file.h"

namespace tokenspeed::model {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

using WeightMap = std::map<std::string, std::string>;  // tensor -> shard

// A shard is named by a bare file name, so that an index cannot reach outside its directory.
bool is_bare_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
}

Result<WeightMap> read_index(const std::string& path) {
  TS_ASSIGN_OR_RETURN(const std::string text, read_file(path));
  simdjson::dom::parser parser;
  simdjson::dom::element root;
  simdjson::dom::object map;
  if (const auto error = parser.parse(text).get(root)) {
    return data_loss("'" + path + "' is not valid JSON (" + simdjson::error_message(error) + ")");
  }
  if (root["weight_map"].get(map)) return data_loss("'" + path + "' has no object 'weight_map'");
  WeightMap shards;
  for (const auto [name, value] : map) {
    std::string_view shard;
    if (value.get(shard)) return data_loss("'" + path + "' gives no file name for tensor '" + std::string(name) + "'");
    if (!is_bare_file_name(shard)) {
      return data_loss("'" + path + "' places tensor '" + std::string(name) + "' in '" + std::string(shard) +
                       "'; shards must be files beside the index");
    }
    if (!shards.emplace(name, shard).second) {
      return data_loss("'" + path + "' names tensor '" + std::string(name) + "' twice");
    }
  }
  if (shards.empty()) return data_loss("'" + path + "' names no tensor");
  return shards;
}

Status check_all_present(const std::string& directory, const std::set<std::string>& shards) {
  constexpr int64_t kNamedAtMost = 8;
  std::string missing;
  int64_t count = 0;
  for (const std::string& shard : shards) {
    std::error_code error;
    if (std::filesystem::exists(directory + "/" + shard, error)) continue;
    if (++count <= kNamedAtMost) missing += (missing.empty() ? "'" : ", '") + shard + "'";
  }
  if (count == 0) return {};
  if (count > kNamedAtMost) missing += ", ...";
  return not_found(std::to_string(count) + " of the " + std::to_string(shards.size()) + " shards named by '" +
                   directory + "/" + kIndexFile + "' are missing: " + missing + "; download them again");
}

Result<CheckpointFiles> open_shards(const std::string& directory, const WeightMap& map) {
  std::set<std::string> names;
  for (const auto& [tensor, shard] : map) names.insert(shard);
  TS_RETURN_IF_ERROR(check_all_present(directory, names));
  CheckpointFiles checkpoint;
  std::map<std::string, const SafetensorsFile*> by_name;
  for (const std::string& name : names) {
    TS_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(directory + "/" + name));
    checkpoint.files.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
    by_name[name] = checkpoint.files.back().get();
  }
  for (const auto& [name, shard] : map) {
    const SafetensorsFile* file = by_name[shard];
    const SafetensorsTensor* tensor = file->find(name);
    if (!tensor) {
      return data_loss("'" + directory + "/" + kIndexFile + "' places tensor '" + name + "' in '" + shard +
                       "', which does not hold it; index and shards do not belong together");
    }
    checkpoint.tensors.push_back({name, file, tensor});
  }
  return checkpoint;
}

// Reading everything at once triples the rate from a cold disk, but files larger than memory would push out their own
// beginning before it is used.
void read_ahead(const CheckpointFiles& checkpoint) {
  size_t bytes = 0;
  for (const auto& file : checkpoint.files) bytes += file->size();
  const size_t memory = static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  using ReadAhead = SafetensorsFile::ReadAhead;
  for (const auto& file : checkpoint.files) {
    file->read_ahead(bytes <= memory / 2 ? ReadAhead::kWhole : ReadAhead::kSequential);
  }
}

Result<CheckpointFiles> open_files(const std::string& directory) {
  std::error_code error;
  const std::string single = directory + "/" + kSingleFile;
  const std::string index = directory + "/" + kIndexFile;
  if (std::filesystem::exists(single, error)) {
    TS_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(single));
    CheckpointFiles checkpoint;
    checkpoint.files.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
    const SafetensorsFile* opened = checkpoint.files.back().get();
    for (const auto& [name, tensor] : opened->tensors()) checkpoint.tensors.push_back({name, opened, &tensor});
    return checkpoint;
  }
  if (!std::filesystem::exists(index, error)) {
    return not_found("'" + directory + "' holds no weights: neither " + kSingleFile + " nor " + kIndexFile +
                     " is there; --load-format dummy gives it random weights");
  }
  TS_ASSIGN_OR_RETURN(const WeightMap map, read_index(index));
  return open_shards(directory, map);
}

}  // namespace

Result<CheckpointFiles> open_checkpoint_files(const std::string& directory) {
  TS_ASSIGN_OR_RETURN(CheckpointFiles checkpoint, open_files(directory));
  read_ahead(checkpoint);
  return checkpoint;
}

}  // namespace tokenspeed::model

#include "model/checkpoint_files.h"

#include <simdjson.h>
#include <unistd.h>

#include <map>
#include <set>
#include <utility>

namespace tokenspeed::model {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

using WeightMap = std::map<std::string, std::string>;  // tensor -> shard

// A shard is named by a bare file name, so that an index cannot reach outside its directory.
bool is_bare_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
}

Result<WeightMap> read_index(const Directory& directory) {
  const std::string path = directory.path_of(kIndexFile);
  TS_ASSIGN_OR_RETURN(const std::string text, directory.read(kIndexFile));
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

Status check_all_present(const Directory& directory, const std::set<std::string>& shards) {
  constexpr int64_t kNamedAtMost = 8;
  std::string missing;
  int64_t count = 0;
  for (const std::string& shard : shards) {
    if (directory.has(shard)) continue;
    if (++count <= kNamedAtMost) missing += (missing.empty() ? "'" : ", '") + shard + "'";
  }
  if (count == 0) return {};
  if (count > kNamedAtMost) missing += ", ...";
  return not_found(std::to_string(count) + " of the " + std::to_string(shards.size()) + " shards named by '" +
                   directory.path_of(kIndexFile) + "' are missing: " + missing + "; download them again");
}

// Opens one more file of the checkpoint, which stays its owner.
Result<const SafetensorsFile*> add_file(const Directory& directory, const std::string& name,
                                        CheckpointFiles& checkpoint) {
  TS_ASSIGN_OR_RETURN(MappedFile mapped, directory.open(name));
  TS_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::parse(std::move(mapped)));
  checkpoint.files.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
  return checkpoint.files.back().get();
}

Result<CheckpointFiles> open_shards(const Directory& directory, const WeightMap& map) {
  std::set<std::string> names;
  for (const auto& [tensor, shard] : map) names.insert(shard);
  TS_RETURN_IF_ERROR(check_all_present(directory, names));
  CheckpointFiles checkpoint;
  std::map<std::string, const SafetensorsFile*> by_name;
  for (const std::string& name : names) {
    TS_ASSIGN_OR_RETURN(by_name[name], add_file(directory, name, checkpoint));
  }
  for (const auto& [name, shard] : map) {
    const SafetensorsFile* file = by_name[shard];
    const SafetensorsTensor* tensor = file->find(name);
    if (!tensor) {
      return data_loss("'" + directory.path_of(kIndexFile) + "' places tensor '" + name + "' in '" + shard +
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

Result<CheckpointFiles> open_files(const Directory& directory) {
  if (directory.has(kSingleFile)) {
    CheckpointFiles checkpoint;
    TS_ASSIGN_OR_RETURN(const SafetensorsFile* opened, add_file(directory, kSingleFile, checkpoint));
    for (const auto& [name, tensor] : opened->tensors()) checkpoint.tensors.push_back({name, opened, &tensor});
    return checkpoint;
  }
  if (!directory.has(kIndexFile)) {
    return not_found("'" + directory.path() + "' holds no weights: neither " + kSingleFile + " nor " + kIndexFile +
                     " is there; --load-format dummy gives it random weights");
  }
  TS_ASSIGN_OR_RETURN(const WeightMap map, read_index(directory));
  return open_shards(directory, map);
}

}  // namespace

Result<CheckpointFiles> open_checkpoint_files(const Directory& directory) {
  TS_ASSIGN_OR_RETURN(CheckpointFiles checkpoint, open_files(directory));
  read_ahead(checkpoint);
  return checkpoint;
}

}  // namespace tokenspeed::model

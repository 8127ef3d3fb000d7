// Small checkpoints with random damage to config.json and to the weights: loading either fails with a sentence, or
// gives a model all of whose tensors can be read from the first byte to the last.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>
#include <random>

#include "base/log.h"
#include "model/architecture.h"
#include "model/checkpoint_builder.h"
#include "model/loader.h"
#include "model/tensor_list.h"

namespace tokenspeed::model {
namespace {

constexpr uint64_t kSeed = 20261125;
constexpr int kRounds = 8'000;
constexpr int64_t kReadAtMost = int64_t{1} << 22;  // elements; a lying config that loads is smaller, or a bug

using Json = nlohmann::ordered_json;
using Random = std::mt19937_64;

uint64_t below(Random& random, uint64_t limit) { return std::uniform_int_distribution<uint64_t>(0, limit - 1)(random); }

// The places a mutation can hit: every member and element, whatever the depth.
void collect(Json& json, std::vector<Json*>& places) {
  if (!json.is_structured()) return;
  for (auto& child : json) {
    places.push_back(&child);
    collect(child, places);
  }
}

Json absurd_value(Random& random) {
  switch (below(random, 14)) {
    case 0:
      return nullptr;
    case 1:
      return -1;
    case 2:
      return 0;
    case 3:
      return 1;
    case 4:
      return int64_t{1} << below(random, 63);
    case 5:
      return UINT64_MAX;
    case 6:
      return 1e300;
    case 7:
      return -0.5;
    case 8:
      return "qwen3_5";
    case 9:
      return std::string(below(random, 300), 'x');
    case 10:
      return Json::array();
    case 11:
      return Json::array({3, "full_attention", nullptr});
    case 12:
      return Json::object({{"a", 1}});
    default:
      return below(random, 2) == 0;
  }
}

void mutate(Random& random, Json& json) {
  std::vector<Json*> places;
  collect(json, places);
  if (places.empty()) return;
  Json& place = *places[below(random, places.size())];
  switch (below(random, 4)) {
    case 0:  // near what is there: off by one, doubled, halved
      if (place.is_number_integer()) {
        const auto value = place.get<int64_t>();
        place = std::array{value + 1, value - 1, value * 2, value / 2}[below(random, 4)];
        break;
      }
      [[fallthrough]];
    case 1:
      place = absurd_value(random);
      break;
    case 2:  // another place's value
      place = Json(*places[below(random, places.size())]);
      break;
    default:
      if (place.is_object() && !place.empty()) {
        place.erase(std::next(place.begin(), static_cast<ptrdiff_t>(below(random, place.size()))));
      } else if (json.is_object() && !json.empty()) {
        json.erase(std::next(json.begin(), static_cast<ptrdiff_t>(below(random, json.size()))));
      }
  }
}

void flip_bytes(Random& random, std::string& text, size_t within) {
  for (uint64_t i = 1 + below(random, 4); i > 0 && within > 0; --i) {
    text[below(random, within)] = static_cast<char>(below(random, 256));
  }
}

struct Files {
  std::string config;
  std::string weights;
};

struct Checkpoint {
  Json config;
  Json header;
  std::string data;
};

Checkpoint read_checkpoint(const std::string& name) {
  const std::string directory = TOKENSPEED_SOURCE_DIR "/tests/goldens/random/" + name;
  const std::string weights = read_all(directory + "/model.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, weights.data(), sizeof(length));
  return {Json::parse(read_all(directory + "/config.json")), Json::parse(weights.substr(sizeof(length), length)),
          weights.substr(sizeof(length) + length)};
}

Files damaged(Random& random, const Checkpoint& good) {
  Json config = good.config;
  Json header = good.header;
  const uint64_t what = below(random, 6);
  for (uint64_t i = 1 + below(random, 3); i > 0; --i) {
    if (what == 0 || what == 5) mutate(random, config);
    if (what == 1 || what == 5) mutate(random, header);
  }
  Files files{config.dump(), with_length(header.dump()) + good.data};
  const size_t header_end = files.weights.size() - good.data.size();
  if (what == 2) flip_bytes(random, files.config, files.config.size());
  if (what == 3) flip_bytes(random, files.weights, header_end);
  if (what == 4) {
    const size_t cut = below(random, 2) == 0 ? header_end + 64 : files.weights.size();
    files.weights.resize(below(random, 8) == 0 ? files.weights.size() + 1 + below(random, 100) : below(random, cut));
  }
  return files;
}

// Every tensor that the model's graph names, whole.
void read_everything(const LoadedModel& model) {
  const auto graph = build_graph(model.config);
  ASSERT_TRUE(graph.ok()) << graph.status().message();
  std::vector<float> row;
  for (const TensorSpec& spec : list_tensors(*graph)) {
    ASSERT_LE(spec.elements() * spec.count, kReadAtMost) << spec.name;
    for (int64_t i = 0; i < spec.count; ++i) {
      const auto view = model.weights->view(spec.name_of(i));
      ASSERT_TRUE(view.ok()) << view.status().message();
      row.resize(static_cast<size_t>(spec.elements()));
      const int64_t rows = view->shape.size() < 2 ? spec.elements() : spec.rows;
      compile::read_rows_as_float(*view, 0, rows, row.data());
    }
  }
}

TEST(LoadingMutation, DamageIsRefusedOrHarmless) {
  spdlog::set_level(spdlog::level::off);
  const std::array checkpoints = {read_checkpoint("dense-a"), read_checkpoint("moe-a")};
  std::map<StatusCode, int> codes;
  for (uint64_t round = 0; round < kRounds && !HasFailure(); ++round) {
    SCOPED_TRACE("seed " + std::to_string(kSeed + round));
    Random random(kSeed + round);
    const Files files = damaged(random, checkpoints[below(random, checkpoints.size())]);
    const std::array embedded = {EmbeddedFile{"config.json", as_bytes(files.config)},
                                 EmbeddedFile{"model.safetensors", as_bytes(files.weights)}};
    const auto model = load_model(Directory::embedded("damaged", embedded), LoadFormat::kAuto);
    ++codes[model.status().code()];
    if (model.ok()) {
      read_everything(*model);
    } else {
      EXPECT_NE(model.status().code(), StatusCode::kInternal) << model.status().message();
      EXPECT_GT(model.status().message().size(), 20u) << model.status().message();
      EXPECT_LT(model.status().message().size(), 2000u) << model.status().message();
    }
  }
  for (const auto& [code, count] : codes) RecordProperty(std::string(status_code_name(code)), count);
  // The damage must be of every kind: some that is seen at once, some only against the weights, some that is none.
  EXPECT_GT(codes[StatusCode::kOk], kRounds / 100);
  EXPECT_GT(codes[StatusCode::kInvalidArgument], kRounds / 100);
  EXPECT_GT(codes[StatusCode::kDataLoss], kRounds / 10);
  EXPECT_GT(codes[StatusCode::kNotFound], kRounds / 1000);
}

}  // namespace
}  // namespace tokenspeed::model

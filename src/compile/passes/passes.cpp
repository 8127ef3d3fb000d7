#include <algorithm>
#include <array>

#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

constexpr std::array<std::string_view, 8> kNames = {
    "merge_projections",
    "fuse_attention_prepare",
    "fuse_gdn_mixer",
    "fuse_shared_expert",
    "fuse_all_reduce_residual_norm",
    "fuse_norm_into_projection",
    "assign_streams",
    "plan_memory",
};

}  // namespace

std::span<const std::string_view> pass_names() { return kNames; }

bool PassOptions::enabled(std::string_view name) const {
  return std::find(disabled.begin(), disabled.end(), name) == disabled.end();
}

Status run_passes(Graph* graph, const PassOptions& options, bool fp8) {
  for (const std::string& name : options.disabled) {
    if (std::find(kNames.begin(), kNames.end(), name) != kNames.end()) continue;
    std::string known;
    for (std::string_view pass : kNames) known.append(known.empty() ? "" : ", ").append(pass);
    return invalid_argument("there is no pass '" + name + "' to disable; the passes are " + known);
  }
  if (options.enabled("merge_projections")) merge_projections(graph, fp8);
  if (options.enabled("fuse_attention_prepare")) fuse_attention_prepare(graph);
  if (options.enabled("fuse_gdn_mixer")) fuse_gdn_mixer(graph);
  if (options.enabled("fuse_shared_expert")) fuse_shared_expert(graph);
  // The residual's norm first: a norm that takes the residual sum with it is better spent there than in a projection.
  if (options.enabled("fuse_all_reduce_residual_norm")) fuse_all_reduce_residual_norm(graph);
  if (options.enabled("fuse_norm_into_projection")) fuse_norm_into_projection(graph);
  if (options.enabled("assign_streams")) assign_streams(graph);
  return {};
}

}  // namespace tokenspeed::compile

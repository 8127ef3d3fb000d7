// Graph passes: each rewrites one pattern, keeps the result, and can be switched off by its name.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "compile/graph.h"

namespace tokenspeed::compile {

struct PassOptions {
  std::vector<std::string> disabled;  // names of pass_names()
  bool enabled(std::string_view name) const;
};

// Inserts a collective wherever a node asks for another placement than its input's value has, on axes with more than
// one rank: Partial -> Replicate all_reduce, Shard -> Replicate all_gather, Partial -> Shard reduce_scatter. Values
// used at the same placement several times are converted once. Anything else is an internal_error that names node and
// value.
Status insert_collectives(Graph* graph);

// fp8: weights that stay bfloat16 are not merged with those that become FP8.
void merge_projections(Graph* graph, bool fp8);
void fuse_attention_prepare(Graph* graph);
void fuse_gdn_mixer(Graph* graph);
void fuse_shared_expert(Graph* graph);
void fuse_all_reduce_residual_norm(Graph* graph);
void fuse_norm_into_projection(Graph* graph);
void assign_streams(Graph* graph);

// All switchable passes in the order they run; "plan_memory" among them (off: no two values share memory).
std::span<const std::string_view> pass_names();
// Runs the enabled ones. invalid_argument when a disabled name is unknown.
Status run_passes(Graph* graph, const PassOptions& options, bool fp8);

}  // namespace tokenspeed::compile

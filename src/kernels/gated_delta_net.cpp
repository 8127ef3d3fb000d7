#include "kernels/gated_delta_net.h"

namespace tokenspeed::kernels {

// The convolved channels and the two gates of every value head, float32.
int64_t gdn_mixer_workspace_bytes(const GdnShape& shape, int64_t tokens) {
  return tokens * (shape.channels() + 2 * shape.value_heads) * static_cast<int64_t>(sizeof(float));
}

}  // namespace tokenspeed::kernels

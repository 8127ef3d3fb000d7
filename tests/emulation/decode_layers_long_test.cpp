// The shapes of small models, and many interleavings.
#include "emulation/decode_layers_check.h"

namespace tokenspeed::kernels {
namespace {

TEST(DecodeLayersLong, ShapesOfModels) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    check_layer(&random, {{2048, 4, 8, 12, 8, 512, fp8}, 17, {1}, {5}});
    check_layer(&random, {{2048, 4, 8, 12, 8, 512, fp8}, 40, {1, 2}, {0, 3}});
    check_layer(&random, {{2048, 4, 8, 12, 8, 512, fp8}, 66, {1, 3, 1, 3}, {4, 0, 9, 7}});
    check_layer(&random, {{4096, 4, 8, 12, 8, 512, fp8}, 33, {1}, {5}});
  }
  check_layer(&random, {{2048, 16, 32, 32, 8, 512, true}, 16, {1}, {5}});
  check_layer(&random, {{2048, 16, 32, 32, 8, 512, true}, 66, {1, 1, 2, 4}, {5, 1, 2, 3}});
}

TEST(DecodeLayersLong, Interleavings) {
  Random random(kData);
  for (const bool fp8 : {true, false}) {
    check_layers(&random, {{256, 2, 8, 12, 4, 128, fp8}, 24, {1}, {5}, 20}, 5);
    check_layers(&random, {{256, 2, 8, 40, 10, 256, fp8}, 11, {1, 2, 1, 4}, {3, 0, 1, 2}, 20}, 3);
    check_layer(&random, {{1280, 2, 8, 12, 4, 128, fp8}, 40, {1}, {5}, 20});
  }
}

}  // namespace
}  // namespace tokenspeed::kernels

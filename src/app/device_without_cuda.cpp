// The GPU's functions in a build without CUDA; src/app/cuda/ has the others.
#ifndef TOKENSPEED_WITH_CUDA
#include "app/device.h"

namespace tokenspeed::app {
namespace {

Status absent() {
  return failed_precondition(
      "this program was built without CUDA; build it where a CUDA toolkit is (make build), or run with --device cpu");
}

}  // namespace

Result<std::string> gpu_name() { return absent(); }
Result<double> gpu_read_bandwidth() { return absent(); }
Result<std::unique_ptr<runtime::Runner>> make_gpu_runner(const model::LoadedModel&, const ModelFlags&,
                                                         std::function<void(const Status&)>) {
  return absent();
}
Result<std::vector<PhaseTime>> profile_step(runtime::Runner&, std::span<const runtime::SequenceStep>,
                                            std::vector<runtime::SequenceResult>*) {
  return absent();
}

}  // namespace tokenspeed::app
#endif

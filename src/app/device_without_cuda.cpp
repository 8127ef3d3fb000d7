// The GPU's functions in a build without CUDA; src/app/cuda/ has the others.
#ifndef TOKENSPEED_WITH_CUDA
#include "app/device.h"
#include "app/phase_time.h"

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
void arm_gpu_fault_dump() {}
Result<std::pair<uint64_t, uint64_t>> gpu_step_times(const runtime::Runner&) { return absent(); }
Result<std::vector<PhaseTime>> profile_gpu_step(runtime::Runner&, std::span<const runtime::SequenceStep>,
                                                std::vector<runtime::SequenceResult>*) {
  return absent();
}
Result<std::vector<PhaseTime>> time_gpu_kinds(runtime::Runner&, std::span<const runtime::SequenceStep>, int32_t) {
  return absent();
}

}  // namespace tokenspeed::app
#endif

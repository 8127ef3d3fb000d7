// decode_layers: ops into launches of the persistent kernel; what that does not take is launched alone.
#include "kernels/cuda/decode_layers_launch.h"

namespace tokenspeed::kernels::cuda {
namespace {

Status launch_alone(const DecodePhase& op, const Launch& launch) {
  if (const auto* linear = std::get_if<DecodeLinear>(&op)) return decode_linear(*linear, launch);
  if (const auto* mixer = std::get_if<GdnMixer>(&op)) return decode_gdn(*mixer, launch);
  if (const auto* attention = std::get_if<DecodeAttention>(&op)) return decode_attention(*attention, launch);
  if (const auto* gate_up = std::get_if<DecodeGateUp>(&op)) return decode_gate_up(*gate_up, launch);
  return decode_down(std::get<DecodeDown>(op), launch);
}

Status launch_layers(LayerProgramWriter& writer, const Launch& launch, DecodeProgress* progress) {
  if (writer.empty()) return {};
  const LayerProgram& program = writer.finish(*progress, memory_cycles(kLayerTileChunk));
  progress->first += static_cast<uint32_t>(program.phase_count);
  const int columns = layer_columns(program.rows);
  const Status status = launch_kernel(
      "decode_layers", launch,
      writer.fp8() ? layers_kernel_fp8(columns, writer.narrow()) : layers_kernel_bf16(columns, writer.narrow()),
      dim3(static_cast<unsigned>(multiprocessors())), layer_threads(columns), writer.shared_bytes(), 1, program);
  writer.clear();
  return status;
}

}  // namespace

Status decode_layers(std::span<const DecodePhase> ops, void* workspace, const Launch& launch,
                     const DecodeProgress& progress) {
  LayerProgramWriter writer(workspace, multiprocessors());
  DecodeProgress next = progress;
  while (!ops.empty()) {
    size_t taken = writer.take(ops);
    if (taken == 0 && !writer.empty()) {
      TS_RETURN_IF_ERROR(launch_layers(writer, launch, &next));
      taken = writer.take(ops);
    }
    if (taken == 0) {
      TS_RETURN_IF_ERROR(launch_alone(ops.front(), launch));
      taken = 1;
      ++next.first;
    }
    ops = ops.subspan(taken);
  }
  return launch_layers(writer, launch, &next);
}

bool decode_layers_takes(const DecodeLinear& op) {
  const DecodePhase phase = op;
  return LayerProgramWriter(nullptr, multiprocessors()).take({&phase, 1}) > 0;
}

}  // namespace tokenspeed::kernels::cuda

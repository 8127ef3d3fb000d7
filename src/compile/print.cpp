#include "compile/print.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "compile/phases.h"

namespace tokenspeed::compile {
namespace {

[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char line[256];
  std::va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(line, sizeof line, pattern, arguments);  // NOLINT(clang-analyzer-valist.Uninitialized): it is started
  va_end(arguments);
  return line;
}

// Three significant digits with a decimal prefix: "12.6 MB".
std::string scaled(double value, const char* unit) {
  if (value == 0) return "-";
  const char* prefix = " ";
  for (const char* next : {"k", "M", "G", "T", "P"}) {
    if (value < 999.5) break;
    value /= 1000;
    prefix = next;
  }
  const int decimals = value >= 99.95 || *prefix == ' ' ? 0 : value >= 9.995 ? 1 : 2;
  return format("%.*f %s%s", decimals, value, *prefix == ' ' ? "" : prefix, unit);
}
std::string bytes_text(int64_t bytes) { return scaled(static_cast<double>(bytes), "B"); }

struct Run {  // operations [begin, end) of one layer, or of none
  int32_t layer = kNone;
  size_t begin = 0;
  size_t end = 0;
};

// Runs with the same operations at the same cost.
struct Group {
  Run first;
  std::vector<int32_t> layers;
};

// "1-2, 4-6, 8-10, ..., 56-58"
std::string ranges(const std::vector<int32_t>& layers) {
  std::vector<std::string> parts;
  for (size_t i = 0; i < layers.size();) {
    size_t last = i;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) ++last;
    parts.push_back(std::to_string(layers[i]) + (last == i ? "" : "-" + std::to_string(layers[last])));
    i = last + 1;
  }
  constexpr size_t kShown = 4;
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts.size() > kShown && i >= kShown - 1 && i + 1 < parts.size()) {
      if (i == kShown - 1) text += ", ...";
      continue;
    }
    text += (i == 0 ? "" : ", ") + parts[i];
  }
  return text;
}

class Page {
 public:
  Page(const Program& program, const DeviceSpec& device, const Cost& cost)
      : program_(program), device_(device), cost_(cost), phases_(group_into_phases(program)) {}

  std::string print() {
    title();
    text_ += format("  %-54s %6s %10s %10s %11s %10s %9s\n", "operation", "stream", "weights", "caches", "activations",
                    "FLOPs", "us");
    for (const Group& group : groups()) section(group);
    totals();
    memory();
    return text_;
  }

 private:
  void title() {
    const int64_t ranks = program_.mesh.size(Axis::kTensor);
    std::string where = device_.name;
    if (ranks > 1)
      where = std::to_string(ranks) + " x " + where + ", tensor parallel, rank " + std::to_string(program_.rank);
    text_ += program_.name + " on " + where + "\n";
    DType weights = DType::kUInt8;
    for (const ProgramWeight& weight : program_.weights) {
      if (weight.form == WeightForm::kVector) continue;
      if (weights == DType::kUInt8 || dtype_size(weight.dtype) < dtype_size(weights)) weights = weight.dtype;
    }
    text_ += format("%s weights, %s activations, %s KV; a step of %lld token%s of %lld sequence%s at context %lld\n\n",
                    std::string(dtype_name(weights)).c_str(), std::string(dtype_name(program_.activation)).c_str(),
                    std::string(dtype_name(program_.kv.dtype)).c_str(), static_cast<long long>(cost_.tokens),
                    cost_.tokens == 1 ? "" : "s", static_cast<long long>(cost_.workload.sequences),
                    cost_.workload.sequences == 1 ? "" : "s", static_cast<long long>(cost_.workload.context));
  }

  std::vector<Group> groups() const {
    std::vector<Group> groups;
    const size_t count = program_.operations.size();
    for (size_t begin = 0; begin < count;) {
      Run run{.layer = program_.operations[begin].layer, .begin = begin, .end = begin};
      while (run.end < count && program_.operations[run.end].layer == run.layer) ++run.end;
      const auto same =
          std::find_if(groups.begin(), groups.end(), [&](const Group& group) { return alike(group.first, run); });
      if (same != groups.end()) {
        same->layers.push_back(run.layer);
      } else {
        groups.push_back({run, {run.layer}});
      }
      begin = run.end;
    }
    return groups;
  }

  bool alike(const Run& a, const Run& b) const {
    if ((a.layer == kNone) != (b.layer == kNone) || a.end - a.begin != b.end - b.begin) return false;
    for (size_t i = 0; i < a.end - a.begin; ++i) {
      const Operation& x = program_.operations[a.begin + i];
      const Operation& y = program_.operations[b.begin + i];
      const OperationCost& cost_x = cost_.operations[a.begin + i];
      const OperationCost& cost_y = cost_.operations[b.begin + i];
      if (x.kind != y.kind || x.stream != y.stream || operation_label(x) != operation_label(y)) return false;
      if (cost_x.bytes() != cost_y.bytes() || cost_x.weight_bytes != cost_y.weight_bytes) return false;
      if (cost_x.flops != cost_y.flops) return false;
    }
    return true;
  }

  void section(const Group& group) {
    if (group.first.layer != kNone) {
      OperationCost sum;
      for (size_t i = group.first.begin; i < group.first.end; ++i) sum.weight_bytes += cost_.operations[i].weight_bytes;
      const PhaseCount phases = count_phases(phases_, group.first.layer);
      const size_t count = group.layers.size();
      std::string heading = (count == 1 ? "layer " : "layers ") + ranges(group.layers);
      if (count > 1) heading += " (" + std::to_string(count) + " alike; the numbers are of one)";
      heading += format(": %d phases", phases.compute);
      if (phases.communication > 0) heading += format(" + %d collectives", phases.communication);
      text_ += heading + ", " + bytes_text(sum.weight_bytes) + " of weights\n";
    } else {
      text_ += group.first.begin == 0 ? "begin\n" : "end\n";
    }
    for (size_t i = group.first.begin; i < group.first.end; ++i) {
      const OperationCost& cost = cost_.operations[i];
      std::string name = operation_label(program_.operations[i]);
      if (name.size() > 54) name = name.substr(0, 51) + "...";
      text_ += format("  %-54s %6d %10s %10s %11s %10s %9.2f\n", name.c_str(), program_.operations[i].stream,
                      bytes_text(cost.weight_bytes).c_str(), bytes_text(cost.cache_bytes).c_str(),
                      bytes_text(cost.activation_bytes).c_str(), scaled(cost.flops, "").c_str(), cost.seconds * 1e6);
    }
  }

  void totals() {
    const OperationCost& total = cost_.total;
    const double per_token = 1.0 / static_cast<double>(cost_.tokens);
    text_ += format("\n  %-54s %6s %10s %10s %11s %10s %9.1f\n\n", "the whole step", "",
                    bytes_text(total.weight_bytes).c_str(), bytes_text(total.cache_bytes).c_str(),
                    bytes_text(total.activation_bytes).c_str(), scaled(total.flops, "").c_str(), total.seconds * 1e6);
    text_ += format("bytes per token and rank  %s of weights, %s in all",
                    gigabytes(static_cast<double>(total.weight_bytes) * per_token).c_str(),
                    gigabytes(static_cast<double>(total.bytes()) * per_token).c_str());
    if (total.link_bytes > 0) {
      text_ += format("; %s sent", scaled(static_cast<double>(total.link_bytes) * per_token, "B").c_str());
    }
    text_ += format("\nroofline                  %.3f ms a step at %s/s: %.1f tok/s\n", cost_.roofline_seconds * 1e3,
                    scaled(device_.read_bandwidth, "B").c_str(), cost_.roofline_tokens_per_second());
    if (cost_.phase_floor_seconds > 0) {
      text_ += format("floor by phases           %.3f ms a step: %.1f tok/s; %zu phases, each at least %.1f us\n",
                      cost_.phase_floor_seconds * 1e3, static_cast<double>(cost_.tokens) / cost_.phase_floor_seconds,
                      phases_.size(), device_.operation_seconds * 1e6);
    }
    text_ += format("prediction                %.3f ms a step: %.1f tok/s, %.0f%% of the roofline\n",
                    total.seconds * 1e3, cost_.tokens_per_second(), 100 * cost_.roofline_seconds / total.seconds);
    if (cost_.workload.price_per_hour > 0) {
      text_ += format("price                     %.3f per million tokens at %.2f per device and hour\n",
                      cost_.price_per_million_tokens(), cost_.workload.price_per_hour);
    }
  }

  static std::string gigabytes(double bytes) { return format("%.3f GB", bytes / 1e9); }

  void memory() {
    const MemoryNeed& need = cost_.memory;
    text_ += format("memory per rank           %s weights, %s arena, %s state per sequence, %s KV per token\n",
                    format("%.2f GB", static_cast<double>(need.weights) / 1e9).c_str(), bytes_text(need.arena).c_str(),
                    bytes_text(need.state_per_sequence).c_str(), bytes_text(need.kv_per_token).c_str());
    text_ += format("fit                       %s: %.1f GB usable of %s", need.fits ? "yes" : "NO",
                    static_cast<double>(need.available) / 1e9, device_.name.c_str());
    if (need.fits) {
      text_ += format(", room for %lld tokens of KV\n", static_cast<long long>(need.kv_tokens));
    } else {
      text_ += "; use more ranks (--tp), FP8 weights or a device with more memory\n";
    }
  }

  const Program& program_;
  const DeviceSpec& device_;
  const Cost& cost_;
  const std::vector<Phase> phases_;
  std::string text_;
};

}  // namespace

// Without the layer's prefix and without the module where the merged parts say enough.
std::string operation_label(const Operation& operation) {
  std::string name = operation.name;
  const std::string layer = "layers." + std::to_string(operation.layer) + ".";
  for (const std::string& prefix : {layer, std::string("mtp.layers.0."), std::string("linear_attn."),
                                    std::string("self_attn."), std::string("mlp.")}) {
    if (const size_t at = name.find(prefix); at != std::string::npos) name.erase(at, prefix.size());
  }
  if (operation.kind == OpKind::kAllReduce || operation.kind == OpKind::kAllGather ||
      operation.kind == OpKind::kReduceScatter) {
    name = std::string(op_kind_name(operation.kind)) + " " + name;
  } else if (operation.kind == OpKind::kLinear) {
    name = "linear " + name;
  }
  return name;
}

std::string operation_shape(const Program& program, const Operation& operation) {
  const Attributes& a = operation.attributes;
  const auto count = [](int64_t n) { return std::to_string(n); };
  switch (operation.kind) {
    case OpKind::kLinear: {
      const ProgramWeight& weight = program.weights[operation.weights[0]];
      return count(weight.rows) + " x " + count(weight.columns) + " " + std::string(dtype_name(weight.dtype));
    }
    case OpKind::kExperts:
      return count(a.top_k) + " of " + count(a.experts) + " x " + count(a.width);
    case OpKind::kAttention:
      return count(a.query_heads) + "/" + count(a.kv_heads) + " heads of " + count(a.head_dim);
    case OpKind::kGatedDeltaRule:
    case OpKind::kGdnMixer:
      return count(a.value_heads) + "/" + count(a.key_heads) + " heads of " + count(a.value_dim);
    default:
      return "";
  }
}

std::string print_plan(const Program& program, const DeviceSpec& device, const Cost& cost) {
  return Page(program, device, cost).print();
}

}  // namespace tokenspeed::compile

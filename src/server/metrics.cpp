#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <mutex>

namespace tokenspeed::server {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;
const Buckets kFirstToken{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5,
                          0.75,  1,     2.5,  5,    7.5,  10,   20,   40,  80};
const Buckets kInterToken{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5};
const Buckets kRequest{0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480};

}  // namespace

struct Metrics::State {
  explicit State(const std::string& model_name) : labels{{"model_name", model_name}} {}
  prometheus::Gauge& gauge(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add(labels);
  }
  prometheus::Counter& counter(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add(labels);
  }
  prometheus::Histogram& histogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels, buckets);
  }

  prometheus::Registry registry;
  prometheus::Labels labels;
  std::mutex mutex;  // two scrapes must not add the same tokens twice
  prometheus::Gauge& running = gauge("vllm:num_requests_running", "Requests in the running batch.");
  prometheus::Gauge& waiting = gauge("vllm:num_requests_waiting", "Requests waiting for admission.");
  prometheus::Gauge& usage = gauge("vllm:kv_cache_usage_perc", "Share of KV pages held; 1 is all.");
  prometheus::Counter& prompt = counter("vllm:prompt_tokens_total", "Prompt tokens processed.");
  prometheus::Counter& generation = counter("vllm:generation_tokens_total", "Tokens generated.");
  prometheus::Histogram& first = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", kFirstToken);
  prometheus::Histogram& inter =
      histogram("vllm:inter_token_latency_seconds", "Time between tokens of a request.", kInterToken);
  prometheus::Histogram& request = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", kRequest);
  prometheus::Family<prometheus::Counter>& success = prometheus::BuildCounter()
                                                         .Name("vllm:request_success_total")
                                                         .Help("Finished requests by reason.")
                                                         .Register(registry);
};

Metrics::Metrics(const std::string& model_name) : state_(std::make_unique<State>(model_name)) {}
Metrics::~Metrics() = default;
void Metrics::observe_first_token(double seconds) { state_->first.Observe(seconds); }
void Metrics::observe_inter_token(double seconds) { state_->inter.Observe(seconds); }

void Metrics::observe_request(double seconds, const std::string& finished_reason) {
  state_->request.Observe(seconds);
  prometheus::Labels labels = state_->labels;
  labels["finished_reason"] = finished_reason;
  state_->success.Add(labels).Increment();
}

std::string Metrics::render(const engine::Statistics& statistics) {
  const std::lock_guard lock(state_->mutex);
  state_->running.Set(static_cast<double>(statistics.running));
  state_->waiting.Set(static_cast<double>(statistics.waiting));
  state_->usage.Set(statistics.kv_cache_usage);
  const auto raise = [](prometheus::Counter& counter, int64_t total) {
    counter.Increment(std::max(0.0, static_cast<double>(total) - counter.Value()));
  };
  raise(state_->prompt, statistics.prompt_tokens);
  raise(state_->generation, statistics.generation_tokens);
  return prometheus::TextSerializer().Serialize(state_->registry.Collect());
}

}  // namespace tokenspeed::server

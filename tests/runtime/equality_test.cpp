// The differential tester: many ways to compute the same requests, which must all give the same answer.
//
// A path is a name and a function from requests to outputs (tokens and every row's logits). Paths that only change what
// a step holds must agree bit for bit with the plain run of the same Program; paths with other kernels, other fusions
// or another device within a named tolerance. New ways to run (a device, a cache, speculation, more ranks) are new
// entries.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "base/random.h"
#include "driver.h"
#include "tensor_parallel.h"
#include "test_model.h"

namespace tokenspeed::runtime {
namespace {

// Between the fast kernels and the plain ones, or two fusions of one Program: the order of sums, and roundings between
// operations that a fusion leaves out.
constexpr float kFloat32PathTolerance = 1e-4f;
constexpr float kFp8KvPathTolerance = 1e-2f;

struct Path {
  std::string name;
  float tolerance = 0;  // greatest difference of a logit; 0: the same bits
  std::function<std::vector<Output>(const TestModel&, const std::vector<Case>&)> run;
};

using Options = std::function<void(CpuRunnerOptions*)>;
using Drive = std::function<void(Driver*)>;

Path path(std::string name, float tolerance, Options change, Drive drive) {
  return {std::move(name), tolerance, [=](const TestModel& model, const std::vector<Case>& cases) {
            CpuRunnerOptions options = test_options();
            change(&options);
            const auto runner = make_runner(model, options);
            Driver driver(runner.get(), cases);
            drive(&driver);
            return driver.outputs();
          }};
}

void unchanged(CpuRunnerOptions*) {}
void alone(Driver* driver) { driver->run_alone(256); }
Drive together(int32_t chunk) {
  return [chunk](Driver* driver) { driver->run_together(chunk); };
}

// With every step submitted before the one before it is waited for.
Drive ahead(int32_t chunk) {
  return [chunk](Driver* driver) { driver->run_together_ahead(chunk); };
}
void two_in_flight(CpuRunnerOptions* options) { options->steps_in_flight = 2; }

// Each request starts three steps after the one before it, the last one first.
void run_staggered(Driver* driver, void (Driver::*run)(std::span<const Share>)) {
  for (int step = 0; !driver->done() && !testing::Test::HasFatalFailure(); ++step) {
    std::vector<Share> shares;
    for (size_t s = driver->outputs().size(); s-- > 0;) {
      const int begin = 3 * static_cast<int>(driver->outputs().size() - 1 - s);
      const int32_t tokens = std::min(driver->remaining(s), 11);
      if (step >= begin && tokens > 0) shares.push_back({s, tokens});
    }
    if (!shares.empty()) (driver->*run)(shares);
  }
  driver->finish();
}
void staggered(Driver* driver) { run_staggered(driver, &Driver::step); }
void staggered_ahead(Driver* driver) { run_staggered(driver, &Driver::step_ahead); }

Options threads(int32_t count) {
  return [count](CpuRunnerOptions* options) { options->threads = count; };
}
Options without(std::vector<std::string> passes) {
  return [passes](CpuRunnerOptions* options) { options->passes.disabled = passes; };
}
std::vector<std::string> all_passes() {
  std::vector<std::string> names;
  for (const std::string_view name : compile::pass_names()) names.emplace_back(name);
  return names;
}
Options reference(std::vector<std::string> disabled_passes) {
  return [disabled_passes](CpuRunnerOptions* options) {
    options->reference_kernels = true;
    options->passes.disabled = disabled_passes;
  };
}

const Path& plain_path() {
  static const Path plain = path("one request at a time", 0, unchanged, alone);
  return plain;
}

std::vector<Path> paths() {
  std::vector<Path> all = {
      path("token by token", 0, unchanged, [](Driver* driver) { driver->run_alone(1); }),
      path("chunks of 7", 0, unchanged, [](Driver* driver) { driver->run_alone(7); }),
      path("chunks of 64", 0, unchanged, [](Driver* driver) { driver->run_alone(64); }),
      path("batched", 0, unchanged, together(256)),
      path("batched, chunks of 5", 0, unchanged, together(5)),
      path("staggered arrivals", 0, unchanged, staggered),
      path("two steps in flight", 0, two_in_flight, ahead(256)),
      path("two steps in flight, chunks of 5", 0, two_in_flight, ahead(5)),
      path("two steps in flight, staggered arrivals", 0, two_in_flight, staggered_ahead),
      path("one thread", 0, threads(1), together(64)),
      path("three threads", 0, threads(3), together(64)),
      path(
          "pages of 3 positions", 0,
          [](CpuRunnerOptions* options) {
            options->page_size = 3;
            options->pages = 1024;
          },
          together(64)),
      path(
          "a small step", 0, [](CpuRunnerOptions* options) { options->max_step_tokens = 9; }, together(4)),
      path("no memory reuse", 0, without({"plan_memory"}), together(64)),
      path("no fusion", kFloat32PathTolerance, without(all_passes()), together(64)),
      path("plain kernels", kFloat32PathTolerance, reference({}), together(64)),
      path("plain kernels, no fusion", kFloat32PathTolerance, reference(all_passes()), together(64)),
  };
  for (const std::string& pass : all_passes()) {
    all.push_back(path("without " + pass, kFloat32PathTolerance, without({pass}), together(64)));
  }
  return all;
}

std::vector<Case> cases_for(const TestModel& model) {
  std::vector<Case> cases;
  const int32_t vocabulary = static_cast<int32_t>(model.config.vocabulary_size);
  uint64_t stream = 0;
  for (const int32_t length : {1, 3, 17, 70}) {
    Case next;
    for (int32_t i = 0; i < length; ++i) {
      next.prompt.push_back(static_cast<int32_t>(philox(1, stream, i)[0] % vocabulary));
    }
    next.new_tokens = 6;
    // Sampling draws depend on (seed, position) alone, so it takes part like greedy choice.
    if (stream++ % 2 == 1) next.sampling = {.temperature = 0.8f, .top_k = 20, .seed = stream};
    cases.push_back(std::move(next));
  }
  return cases;
}

// With a tolerance, tokens are compared as far as they agree: one near tie resolved differently makes another sequence.
void expect_equal(const Output& output, const Output& expected, int64_t vocabulary, float tolerance) {
  ASSERT_TRUE(output.status.ok()) << output.status.message();
  if (tolerance == 0) {
    EXPECT_EQ(output.tokens, expected.tokens);
    EXPECT_TRUE(output.logits == expected.logits)
        << "greatest difference " << greatest_difference(output.logits, expected.logits);
    return;
  }
  ASSERT_EQ(output.tokens.size(), expected.tokens.size());
  const auto same = std::mismatch(output.tokens.begin(), output.tokens.end(), expected.tokens.begin()).first;
  const size_t differing = static_cast<size_t>(output.tokens.end() - same);
  const size_t rows = expected.logits.size() / vocabulary - (differing > 0 ? differing - 1 : 0);
  EXPECT_EQ(differing, 0u) << "a token differs; logits up to it are compared";
  EXPECT_LE(greatest_difference(std::span(output.logits).first(rows * vocabulary),
                                std::span(expected.logits).first(rows * vocabulary)),
            tolerance);
}

class Equality : public testing::TestWithParam<const char*> {
 protected:
  const TestModel& model() const { return test_model(random_directory(GetParam())); }
};

TEST_P(Equality, EveryPathGivesTheSameTokensAndLogits) {
  const std::vector<Case> cases = cases_for(model());
  const std::vector<Output> expected = plain_path().run(model(), cases);
  for (const Path& path : paths()) {
    SCOPED_TRACE(path.name);
    const std::vector<Output> outputs = path.run(model(), cases);
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      expect_equal(outputs[i], expected[i], model().config.vocabulary_size, path.tolerance);
    }
  }
}

TEST_P(Equality, BFloat16BatchedIsTheSameBits) {
  const std::vector<Case> cases = cases_for(model());
  const Options bfloat16 = [](CpuRunnerOptions* options) { *options = bfloat16_options(); };
  const std::vector<Output> expected = path("alone", 0, bfloat16, alone).run(model(), cases);
  for (const Drive& drive : {together(256), together(5), Drive(staggered)}) {
    const std::vector<Output> outputs = path("", 0, bfloat16, drive).run(model(), cases);
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      expect_equal(outputs[i], expected[i], model().config.vocabulary_size, 0);
    }
  }
}

// With plain kernels a value on the edge between two codes may fall to the other one.
TEST_P(Equality, Fp8KvCache) {
  const std::vector<Case> cases = cases_for(model());
  const Options fp8 = [](CpuRunnerOptions* options) { options->kv = DType::kFloat8E4M3; };
  const Options plain = [](CpuRunnerOptions* options) {
    options->kv = DType::kFloat8E4M3;
    options->reference_kernels = true;
  };
  const std::vector<Output> expected = path("alone", 0, fp8, alone).run(model(), cases);
  for (const Path& each : {path("batched", 0, fp8, together(5)), path("staggered", 0, fp8, staggered),
                           path("plain kernels", kFp8KvPathTolerance, plain, together(64))}) {
    SCOPED_TRACE(each.name);
    const std::vector<Output> outputs = each.run(model(), cases);
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      expect_equal(outputs[i], expected[i], model().config.vocabulary_size, each.tolerance);
    }
  }
}

// Two ranks in one process: their slices of the weights and their collectives give what one rank gives.
class TensorParallelEquality : public Equality {};

TEST_P(TensorParallelEquality, TwoRanksGiveWhatOneGives) {
  const std::vector<Case> cases = cases_for(model());
  const std::vector<Output> expected = plain_path().run(model(), cases);
  for (const std::vector<std::string>& disabled : {std::vector<std::string>{}, all_passes()}) {
    SCOPED_TRACE(disabled.empty() ? "fused" : "not fused");
    CpuRunnerOptions options = test_options();
    options.passes.disabled = disabled;
    TensorParallelRunner runner(model(), 2, options);
    Driver driver(&runner, cases);
    driver.run_together(64);
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      expect_equal(driver.outputs()[i], expected[i], model().config.vocabulary_size, kFloat32PathTolerance);
    }
  }
}

std::string model_name(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  name[name.find('-')] = '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(Models, Equality, testing::Values("dense-a", "moe-a", "moe-b"), model_name);
// dense-a has three attention heads.
INSTANTIATE_TEST_SUITE_P(Models, TensorParallelEquality, testing::Values("moe-a", "moe-b"), model_name);

// Random requests in random steps: any subset, any order in the step, any chunk sizes, ahead of the step before or not.
RC_GTEST_PROP(EqualityProperty, AnyScheduleGivesTheBitsOfRunningAlone, ()) {
  static const std::unique_ptr<CpuRunner> runner = [] {
    CpuRunnerOptions options = test_options();
    two_in_flight(&options);
    return make_runner(test_model(random_directory("moe-a")), options);
  }();
  const int32_t vocabulary = runner->capacity().vocabulary_size;
  std::vector<Case> cases(*rc::gen::inRange<size_t>(1, 5));
  for (Case& next : cases) {
    const auto length = *rc::gen::inRange<size_t>(1, 24);
    next.prompt = *rc::gen::container<std::vector<int32_t>>(length, rc::gen::inRange<int32_t>(0, vocabulary));
    next.new_tokens = *rc::gen::inRange<int32_t>(1, 5);
    next.sampling.temperature = *rc::gen::element(0.0f, 1.0f);
    next.sampling.seed = *rc::gen::arbitrary<uint64_t>();
  }
  Driver expected(runner.get(), cases);
  expected.run_alone(256);

  Driver driver(runner.get(), cases);
  while (!driver.done()) {
    std::vector<Share> shares;
    if (*rc::gen::arbitrary<bool>()) driver.finish();
    for (size_t s = 0; s < cases.size(); ++s) {
      if (driver.remaining(s) == 0 || !*rc::gen::arbitrary<bool>()) continue;
      shares.push_back({s, *rc::gen::inRange<int32_t>(1, driver.remaining(s) + 1)});
    }
    for (size_t i = shares.size(); i > 1; --i) std::swap(shares[i - 1], shares[*rc::gen::inRange<size_t>(0, i)]);
    if (!shares.empty()) driver.step_ahead(shares);
  }
  driver.finish();
  RC_ASSERT(driver.outputs() == expected.outputs());
}

}  // namespace
}  // namespace tokenspeed::runtime

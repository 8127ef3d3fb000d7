// What chat and completions make of a request: choices, forced and forbidden calls, sampling, errors under way.
#include "server/server_fixture.h"

namespace tokenspeed::server {
namespace {

class GenerationTest : public ServerTest {
 protected:
  Json chat_answer(const Json& extra) {
    const Answer answer = post("/v1/chat/completions", chat(extra).dump());
    EXPECT_EQ(answer.status, 200) << answer.body;
    return Json::parse(answer.body);
  }
  Json completion(const Json& request) {
    const Answer answer = post("/v1/completions", request.dump());
    EXPECT_EQ(answer.status, 200) << answer.body;
    return Json::parse(answer.body);
  }
  runtime::SamplingParameters last_seen() const { return script_->seen().back(); }
  std::string prompt_of(const Json& request) {
    const Json ids = Json::parse(post("/tokenize", request.dump()).body)["tokens"];
    return tokenizer_->decode(ids.get<std::vector<int32_t>>(), false);
  }
};

TEST_F(GenerationTest, NamedToolChoiceStartsThatCall) {
  Json tools = kTools;
  tools.push_back({{"type", "function"}, {"function", {{"name", "get_time"}}}});
  say("</function>\n</tool_call>");
  const Json named = {{"type", "function"}, {"function", {{"name", "get_time"}}}};
  const Json json = chat_answer({{"tools", tools}, {"tool_choice", named}});
  ASSERT_EQ(json["choices"][0]["message"]["tool_calls"].size(), 1u);
  EXPECT_EQ(json["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "get_time");
  EXPECT_EQ(json["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"], "{}");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "tool_calls");
  const Json unknown = {{"type", "function"}, {"function", {{"name", "other"}}}};
  const Answer refused = post("/v1/chat/completions", chat({{"tools", tools}, {"tool_choice", unknown}}).dump());
  EXPECT_EQ(refused.status, 400);
  EXPECT_EQ(Json::parse(refused.body)["error"]["param"], "tool_choice");
}

TEST_F(GenerationTest, ToolChoiceNoneHidesTheTools) {
  say(std::string("</think>\n\n") + kCall);
  const Json json = chat_answer({{"tools", kTools}, {"tool_choice", "none"}});
  EXPECT_FALSE(json["choices"][0]["message"].contains("tool_calls"));
  EXPECT_EQ(json["choices"][0]["message"]["content"], kCall);
  EXPECT_EQ(json["usage"]["prompt_tokens"], chat_answer(Json::object())["usage"]["prompt_tokens"]);
}

TEST_F(GenerationTest, ParallelCallsComeApart) {
  say(std::string("</think>\n\n") + kCall + "\n" + kCall);
  const Json calls = chat_answer({{"tools", kTools}})["choices"][0]["message"]["tool_calls"];
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_NE(calls[0]["id"], calls[1]["id"]);
  std::vector<std::string> arguments(2);
  for (const Json& chunk : events(post("/v1/chat/completions", chat({{"tools", kTools}, {"stream", true}}).dump()))) {
    for (const Json& call : chunk["choices"][0]["delta"].value("tool_calls", Json::array())) {
      arguments.at(call["index"]) += call["function"]["arguments"].get<std::string>();
    }
  }
  EXPECT_EQ(arguments[0], calls[0]["function"]["arguments"]);
  EXPECT_EQ(arguments[1], arguments[0]);
}

TEST_F(GenerationTest, ThinkingCanBeOff) {
  say("Hello.");
  const Json off = {{"enable_thinking", false}};
  const Json json = chat_answer({{"chat_template_kwargs", off}});
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hello.");
  EXPECT_FALSE(json["choices"][0]["message"].contains("reasoning_content"));
  EXPECT_TRUE(prompt_of(chat({{"chat_template_kwargs", off}})).ends_with("<think>\n\n</think>\n\n"));
  EXPECT_TRUE(prompt_of(chat()).ends_with("<think>\n"));
}

TEST_F(GenerationTest, DeveloperIsSystemAndPartsAreText) {
  const auto with_role = [](const char* role) {
    return Json{
        {"messages",
         {{{"role", role}, {"content", {{{"type", "text"}, {"text", "Be "}}, {{"type", "text"}, {"text", "brief."}}}}},
          {{"role", "user"}, {"content", "Hello"}}}}};
  };
  EXPECT_EQ(prompt_of(with_role("developer")), prompt_of(with_role("system")));
  EXPECT_NE(prompt_of(with_role("system")).find("Be brief."), std::string::npos);
}

TEST_F(GenerationTest, SamplingFieldsReachTheRunner) {
  say("</think>\n\nx");
  chat_answer({{"temperature", 0.25},
               {"top_p", 0.5},
               {"top_k", 7},
               {"min_p", 0.125},
               {"repetition_penalty", 1.5},
               {"presence_penalty", -0.5},
               {"frequency_penalty", 0.75},
               {"seed", 99},
               {"logit_bias", {{"5", -100}, {"6119", 2.5}}},
               {"logprobs", true},
               {"top_logprobs", 3}});
  const runtime::SamplingParameters seen = last_seen();
  EXPECT_EQ(seen.temperature, 0.25f);
  EXPECT_EQ(seen.top_p, 0.5f);
  EXPECT_EQ(seen.top_k, 7);
  EXPECT_EQ(seen.min_p, 0.125f);
  EXPECT_EQ(seen.repetition_penalty, 1.5f);
  EXPECT_EQ(seen.presence_penalty, -0.5f);
  EXPECT_EQ(seen.frequency_penalty, 0.75f);
  EXPECT_EQ(seen.seed, 99u);
  EXPECT_EQ(seen.logprobs, 3);
  EXPECT_EQ(seen.logit_bias, (std::vector<std::pair<int32_t, float>>{{5, -100.0f}, {6119, 2.5f}}));
  chat_answer({{"top_k", -1}});
  EXPECT_EQ(last_seen().top_k, 0);
  EXPECT_EQ(last_seen().logprobs, -1);
}

TEST_F(GenerationTest, SeedsAreGivenOrFresh) {
  const auto seeds = [&](const Json& request) {
    const size_t before = script_->seen().size();
    completion(request);
    std::vector<uint64_t> out;
    for (const auto& entry : script_->seen()) out.push_back(entry.seed);
    out.erase(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(before));
    return out;
  };
  const Json seeded = {{"prompt", "a"}, {"seed", 5}, {"max_tokens", 1}};
  EXPECT_EQ(seeds(seeded), (std::vector<uint64_t>{5}));
  Json many = seeded;
  many["n"] = 3;
  const auto three = seeds(many);
  ASSERT_EQ(three.size(), 3u);
  EXPECT_EQ(three[0], 5u);
  EXPECT_NE(three[1], three[0]);
  EXPECT_NE(three[2], three[1]);
  EXPECT_EQ(seeds(many), three);
  const Json fresh = {{"prompt", "a"}, {"max_tokens", 1}};
  EXPECT_NE(seeds(fresh), seeds(fresh));
}

TEST_F(GenerationTest, MaxCompletionTokensAndLength) {
  say("</think>\n\none two three four five six seven");
  const Json json = chat_answer({{"max_tokens", 9}, {"max_completion_tokens", 3}});
  EXPECT_EQ(json["usage"]["completion_tokens"], 3);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
}

TEST_F(GenerationTest, CompletionsStreamEqualsWhole) {
  say("one two three");
  Json request = {{"prompt", {"ab", "cd"}}, {"n", 2}, {"echo", true}, {"logprobs", 1}, {"return_token_ids", true}};
  const Json whole = completion(request);
  ASSERT_EQ(whole["choices"].size(), 4u);
  request["stream"] = true;
  request["stream_options"] = {{"include_usage", true}};
  const auto chunks = events(post("/v1/completions", request.dump()));
  EXPECT_EQ(chunks.back()["usage"], whole["usage"]);
  for (size_t index = 0; index < 4; ++index) {
    const Json& expected = whole["choices"][index];
    std::string text, reason;
    Json ids = Json::array(), tokens = Json::array(), offsets = Json::array();
    for (const Json& chunk : chunks) {
      if (chunk["choices"].empty() || chunk["choices"][0]["index"] != index) continue;
      const Json& choice = chunk["choices"][0];
      text += choice["text"].get<std::string>();
      for (const Json& id : choice["token_ids"]) ids.push_back(id);
      for (const Json& token : choice["logprobs"]["tokens"]) tokens.push_back(token);
      for (const Json& offset : choice["logprobs"]["text_offset"]) offsets.push_back(offset);
      if (!choice["finish_reason"].is_null()) reason = choice["finish_reason"];
    }
    EXPECT_EQ(text, expected["text"]);
    EXPECT_EQ(text, std::string(index < 2 ? "ab" : "cd") + "one two three");
    EXPECT_EQ(ids, expected["token_ids"]);
    EXPECT_EQ(tokens, expected["logprobs"]["tokens"]);
    EXPECT_EQ(offsets, expected["logprobs"]["text_offset"]);
    EXPECT_EQ(reason, expected["finish_reason"]);
  }
}

TEST_F(GenerationTest, EchoWithoutNewTokensScoresThePrompt) {
  const Json request = {{"prompt", {1, 2, 3}}, {"echo", true}, {"max_tokens", 0}, {"logprobs", 0}};
  const Json json = completion(request);
  EXPECT_EQ(json["usage"]["completion_tokens"], 0);
  const Json& choice = json["choices"][0];
  EXPECT_EQ(choice["text"], tokenizer_->decode(std::vector<int32_t>{1, 2, 3}, false));
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["logprobs"]["token_logprobs"], Json({nullptr, -1.0, -1.0}));
  Json streamed = request;
  streamed["stream"] = true;
  const auto chunks = events(post("/v1/completions", streamed.dump()));
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0]["choices"][0]["text"], choice["text"]);
  EXPECT_EQ(chunks[0]["choices"][0]["logprobs"], choice["logprobs"]);
  Json without_echo = request;
  without_echo.erase("echo");
  EXPECT_EQ(post("/v1/completions", without_echo.dump()).status, 400);
}

TEST_F(GenerationTest, EngineErrorsAreAnsweredWhole) {
  say("one two three four");
  script_->fail_at = 2;
  const Answer answer = post("/v1/completions", R"({"prompt":"a"})");
  EXPECT_EQ(answer.status, 500);
  EXPECT_EQ(Json::parse(answer.body)["error"]["type"], "server_error");
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

TEST_F(GenerationTest, EngineErrorsEndAStream) {
  say("one two three four");
  script_->fail_at = 2;
  const Answer answer = post("/v1/completions", R"({"prompt":"a","stream":true,"n":2})");
  EXPECT_EQ(answer.status, 200);
  EXPECT_TRUE(answer.body.ends_with("data: [DONE]\n\n"));
  const auto chunks = events(answer);
  ASSERT_GE(chunks.size(), 2u);
  EXPECT_EQ(chunks.front()["choices"][0]["text"], "one");
  EXPECT_NE(chunks.back()["error"]["message"].get<std::string>().find("not finite"), std::string::npos);
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

TEST_F(GenerationTest, AFullQueueIs429) {
  start(options(), {.max_num_seqs = 1, .max_waiting = 1});
  script_->delay_us = 1000;
  const Answer answer = post("/v1/completions", R"({"prompt":"a","n":64,"ignore_eos":true,"max_tokens":1000})");
  EXPECT_EQ(answer.status, 429);
  EXPECT_EQ(Json::parse(answer.body)["error"]["type"], "rate_limit_error");
  EXPECT_NE(answer.head.find("Retry-After:"), std::string::npos);
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
  EXPECT_EQ(post("/v1/completions", R"({"prompt":"a","max_tokens":1})").status, 200);
}

TEST_F(GenerationTest, AnEngineThatStopsIs503) {
  script_->delay_us = 2000;
  Answer answer;
  std::jthread client(
      [&] { answer = post("/v1/completions", R"({"prompt":"a","ignore_eos":true,"max_tokens":1000})"); });
  while (engine_->statistics().running == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  engine_.reset();  // nothing but the answer is asked of the server after this
  client.join();
  EXPECT_EQ(answer.status, 503);
  EXPECT_EQ(Json::parse(answer.body)["error"]["type"], "server_error");
}

TEST_F(GenerationTest, WithoutTokenizerTokenIdsOnly) {
  start(options(), {}, kSource + "/tests/goldens/random/moe-a");
  script_->tokens = {7, 8, 9};
  const Json json = completion({{"prompt", {1, 2}}, {"max_tokens", 3}, {"logprobs", 1}, {"return_token_ids", true}});
  EXPECT_EQ(json["choices"][0]["token_ids"], Json({7, 8, 9}));
  EXPECT_EQ(json["choices"][0]["text"], "");
  EXPECT_EQ(json["choices"][0]["logprobs"]["tokens"], Json({"token_id:7", "token_id:8", "token_id:9"}));
  const auto refused = [&](const char* path, const char* body, const char* param) {
    const Answer answer = post(path, body);
    EXPECT_EQ(answer.status, 400) << answer.body;
    const Json error = Json::parse(answer.body)["error"];
    EXPECT_NE(error["message"].get<std::string>().find("tokenizer"), std::string::npos);
    EXPECT_EQ(error["param"], param == nullptr ? Json() : Json(param));
  };
  refused("/v1/completions", R"({"prompt":"text"})", "prompt");
  refused("/v1/completions", R"({"prompt":[1],"stop":"x"})", "stop");
  refused("/v1/chat/completions", R"({"messages":[{"role":"user","content":"a"}]})", nullptr);
  refused("/tokenize", R"({"prompt":"a"})", nullptr);
  refused("/detokenize", R"({"tokens":[1]})", nullptr);
}

TEST_F(GenerationTest, MetricsCountWhatHappened) {
  say("one two three");
  completion({{"prompt", {1, 2, 3}}, {"max_tokens", 2}});
  const std::string text = get("/metrics").body;
  for (const char* line :
       {"vllm:prompt_tokens_total{model_name=\"demo\"} 3", "vllm:generation_tokens_total{model_name=\"demo\"} 2",
        "vllm:time_to_first_token_seconds_count{model_name=\"demo\"} 1",
        "vllm:inter_token_latency_seconds_count{model_name=\"demo\"} 1",
        "vllm:e2e_request_latency_seconds_count{model_name=\"demo\"} 1",
        "vllm:num_requests_waiting{model_name=\"demo\"} 0", "vllm:kv_cache_usage_perc{model_name=\"demo\"} 0"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line;
  }
  EXPECT_NE(text.find("vllm:request_success_total{finished_reason=\"length\",model_name=\"demo\"} 1"),
            std::string::npos);
}

TEST_F(GenerationTest, VersionIsTheProjects) {
  EXPECT_EQ(Json::parse(get("/version").body)["version"], TOKENSPEED_VERSION);
}

}  // namespace
}  // namespace tokenspeed::server

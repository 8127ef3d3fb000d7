// The endpoints, what they refuse, and how connections end.
#include "server/server_fixture.h"

namespace tokenspeed::server {
namespace {

TEST_F(ServerTest, PlainEndpoints) {
  EXPECT_EQ(Json::parse(get("/v1/models").body)["data"][0]["id"], "demo");
  EXPECT_EQ(get("/v1/models/demo").status, 200);
  EXPECT_EQ(Json::parse(get("/v1/models/other").body)["error"]["code"], "model_not_found");
  EXPECT_EQ(get("/health").status, 200);
  EXPECT_EQ(get("/version").status, 200);
  EXPECT_NE(get("/").body.find("demo"), std::string::npos);
  EXPECT_NE(get("/metrics").body.find("vllm:num_requests_running{model_name=\"demo\"}"), std::string::npos);
  EXPECT_EQ(get("/nothing").status, 404);
  EXPECT_EQ(get("/v1/completions").status, 405);
}

TEST_F(ServerTest, ChatWhole) {
  say("I think.\n</think>\n\nHello there.");
  const Answer answer = post("/v1/chat/completions", chat({{"logprobs", true}, {"n", 2}}).dump());
  ASSERT_EQ(answer.status, 200) << answer.body;
  const Json json = Json::parse(answer.body);
  ASSERT_EQ(json["choices"].size(), 2u);
  EXPECT_EQ(json["choices"][1]["message"]["content"], "Hello there.");
  EXPECT_EQ(json["choices"][0]["message"]["reasoning_content"], "I think.");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["choices"][0]["logprobs"]["content"].size(), script_->tokens.size() + 1);
  EXPECT_EQ(json["usage"]["completion_tokens"], 2 * (script_->tokens.size() + 1));
}

TEST_F(ServerTest, ChatStreamEqualsWhole) {
  say("I think.\n</think>\n\nHello \"you\"\nthere.");
  const Answer answer =
      post("/v1/chat/completions", chat({{"stream", true}, {"stream_options", {{"include_usage", true}}}}).dump());
  ASSERT_EQ(answer.status, 200);
  EXPECT_TRUE(answer.body.ends_with("data: [DONE]\n\n"));
  std::string content, reasoning;
  const auto chunks = events(answer);
  ASSERT_GT(chunks.size(), 3u);
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["role"], "assistant");
  for (const Json& chunk : chunks) {
    if (chunk["choices"].empty()) continue;
    content += chunk["choices"][0]["delta"].value("content", "");
    reasoning += chunk["choices"][0]["delta"].value("reasoning_content", "");
  }
  EXPECT_EQ(content, "Hello \"you\"\nthere.");
  EXPECT_EQ(reasoning, "I think.");
  EXPECT_EQ(chunks[chunks.size() - 2]["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(chunks.back()["usage"]["completion_tokens"], script_->tokens.size() + 1);
}

TEST_F(ServerTest, ToolCallsWholeAndStreamed) {
  say(std::string("Look.\n</think>\n\n") + kCall);
  const Json whole = Json::parse(post("/v1/chat/completions", chat({{"tools", kTools}}).dump()).body);
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "tool_calls");
  const Json call = whole["choices"][0]["message"]["tool_calls"][0];
  EXPECT_EQ(Json::parse(call["function"]["arguments"].get<std::string>()), Json({{"city", "Rome"}, {"days", 3}}));
  std::string arguments, name;
  for (const Json& chunk : events(post("/v1/chat/completions", chat({{"tools", kTools}, {"stream", true}}).dump()))) {
    const Json& delta = chunk["choices"][0]["delta"];
    if (!delta.contains("tool_calls")) continue;
    name += delta["tool_calls"][0]["function"].value("name", "");
    arguments += delta["tool_calls"][0]["function"]["arguments"].get<std::string>();
  }
  EXPECT_EQ(name, "get_weather");
  EXPECT_EQ(arguments, call["function"]["arguments"]);
}

TEST_F(ServerTest, RequiredCallIsForcedAndOneCallOnly) {
  const std::string rest = std::string(kCall).substr(std::string("<tool_call>\n<function=get_weather>\n").size());
  say(rest + "\n" + kCall);
  const Json request = chat({{"tools", kTools}, {"tool_choice", "required"}, {"parallel_tool_calls", false}});
  const Json json = Json::parse(post("/v1/chat/completions", request.dump()).body);
  ASSERT_EQ(json["choices"][0]["message"]["tool_calls"].size(), 1u);
  EXPECT_EQ(json["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

TEST_F(ServerTest, StopStringEndsTheText) {
  say("</think>\n\none two three four");
  const Json json = Json::parse(post("/v1/chat/completions", chat({{"stop", " three"}}).dump()).body);
  EXPECT_EQ(json["choices"][0]["message"]["content"], "one two");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
}

TEST_F(ServerTest, CompletionsWithTokenIdsEchoAndLogprobs) {
  say("abc def");
  const Json request = {
      {"prompt", {1, 2, 3}}, {"echo", true}, {"logprobs", 2}, {"return_token_ids", true}, {"max_tokens", 2}};
  const Answer answer = post("/v1/completions", request.dump());
  ASSERT_EQ(answer.status, 200) << answer.body;
  const Json choice = Json::parse(answer.body)["choices"][0];
  EXPECT_EQ(choice["prompt_token_ids"], Json({1, 2, 3}));
  EXPECT_EQ(choice["token_ids"].size(), 2u);
  EXPECT_EQ(choice["logprobs"]["tokens"].size(), 5u);
  EXPECT_TRUE(choice["logprobs"]["token_logprobs"][0].is_null());
  EXPECT_EQ(choice["finish_reason"], "length");
}

TEST_F(ServerTest, TokenizeThereAndBack) {
  const Json ids = Json::parse(post("/tokenize", R"({"prompt":"Hello you","return_token_strs":true})").body);
  EXPECT_EQ(ids["count"], ids["tokens"].size());
  EXPECT_EQ(ids["token_strs"].size(), ids["tokens"].size());
  EXPECT_EQ(Json::parse(post("/detokenize", Json({{"tokens", ids["tokens"]}}).dump()).body)["prompt"], "Hello you");
}

TEST_F(ServerTest, BadInputIsNamed) {
  struct Case {
    const char* path;
    std::string body;
    int status;
    const char* param;
  };
  const auto with = [&](const std::string& field) {
    return R"({"messages":[{"role":"user","content":"a"}],)" + field + "}";
  };
  const Case cases[] = {
      {"/v1/chat/completions", "{", 400, nullptr},
      {"/v1/chat/completions", "[]", 400, nullptr},
      {"/v1/completions", std::string(R"({"prompt":[1],"max_tokens":1})") + '\0' + "x", 400, nullptr},
      {"/v1/chat/completions", with(R"("response_format":{"type":"json_object"})"), 400, "response_format"},
      {"/v1/chat/completions", with(R"("stop":["a",""])"), 400, "stop"},
      {"/v1/chat/completions", "{\"messages\":\"\xff\"}", 400, nullptr},
      {"/v1/chat/completions", std::string(500000, '['), 400, nullptr},
      {"/v1/chat/completions", "{}", 400, "messages"},
      {"/v1/chat/completions", R"({"messages":[]})", 400, "messages"},
      {"/v1/chat/completions", R"({"messages":[{"role":"bot","content":"a"}]})", 400, "messages[0].role"},
      {"/v1/chat/completions", R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})", 400,
       "messages[0].content"},
      {"/v1/chat/completions", with(R"("temperature":-1)"), 400, "temperature"},
      {"/v1/chat/completions", with(R"("temperature":"hot")"), 400, "temperature"},
      {"/v1/chat/completions", with(R"("temperature":NaN)"), 400, nullptr},
      {"/v1/chat/completions", with(R"("top_p":0)"), 400, "top_p"},
      {"/v1/chat/completions", with(R"("n":0)"), 400, "n"},
      {"/v1/chat/completions", with(R"("max_tokens":99999)"), 400, "max_tokens"},
      {"/v1/chat/completions", with(R"("logit_bias":{"x":1})"), 400, "logit_bias"},
      {"/v1/chat/completions", with(R"("tool_choice":"required")"), 400, "tool_choice"},
      {"/v1/chat/completions", with(R"("model":"other")"), 404, "model"},
      {"/v1/completions", R"({"prompt":[]})", 400, "prompt"},
      {"/v1/completions", R"({"prompt":[99999]})", 400, "prompt"},
      {"/v1/completions", R"({"prompt":"a","suffix":"b"})", 400, "suffix"},
      {"/v1/completions", R"({"prompt":"a","logprobs":21})", 400, "logprobs"},
  };
  for (const Case& entry : cases) {
    const Answer answer = post(entry.path, entry.body);
    EXPECT_EQ(answer.status, entry.status) << entry.body.substr(0, 200);
    const Json error = Json::parse(answer.body)["error"];
    EXPECT_FALSE(error["message"].get<std::string>().empty());
    if (entry.param != nullptr) {
      EXPECT_EQ(error["param"], entry.param) << answer.body;
    }
  }
  EXPECT_EQ(post("/v1/completions", std::string(2 << 20, ' ')).status, 413);
  EXPECT_EQ(raw("NONSENSE\r\n\r\n").status, 400);
  EXPECT_EQ(get("/health").status, 200);
}

TEST_F(ServerTest, KeepAliveAnswersPipelinedRequestsInOrder) {
  const Answer answer = raw(head("GET", "/version", 0, "keep-alive") + head("GET", "/nothing", 0, "close"));
  EXPECT_EQ(answer.status, 200);
  EXPECT_NE(answer.body.find("HTTP/1.1 404"), std::string::npos);
}

TEST_F(ServerTest, DroppedConnectionCancels) {
  script_->tokens.assign(4000, 40);
  script_->delay_us = 2000;
  const std::string body = chat({{"stream", true}}).dump();
  {
    auto socket = connect();
    boost::asio::write(socket, boost::asio::buffer(head("POST", "/v1/chat/completions", body.size(), "close") + body));
    std::string some(300, ' ');  // more than the head: a token has come
    boost::asio::read(socket, boost::asio::buffer(some));
    EXPECT_TRUE(running_within(std::chrono::seconds(2), 1));
  }
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

TEST_F(ServerTest, KeyIsAskedFor) {
  start({.host = "127.0.0.1", .port = 0, .api_key = "secret", .max_body_bytes = 1 << 20});
  EXPECT_EQ(get("/v1/models").status, 401);
  EXPECT_EQ(get("/health").status, 200);
  EXPECT_EQ(
      raw("GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nConnection: close\r\n\r\n").status,
      200);
}

TEST_F(ServerTest, PortInUseNamesTheRemedy) {
  auto model = load_served_model("demo", std::string(TOKENSPEED_SOURCE_DIR) + "/models/demo", 2048, kVocabulary);
  ASSERT_TRUE(model.ok());
  auto second =
      Server::start({.host = "127.0.0.1", .port = server_->port(), .api_key = ""}, std::move(model).value(), *engine_);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("--port"), std::string::npos);
}

TEST_F(ServerTest, StopEndsStreams) {
  script_->tokens.assign(4000, 40);
  script_->delay_us = 2000;
  const std::string body = chat({{"stream", true}}).dump();
  auto socket = connect();
  boost::asio::write(socket, boost::asio::buffer(head("POST", "/v1/chat/completions", body.size(), "close") + body));
  std::string some(300, ' ');  // more than the head: a token has come
  boost::asio::read(socket, boost::asio::buffer(some));
  EXPECT_TRUE(running_within(std::chrono::seconds(2), 1));
  server_->stop();
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

}  // namespace
}  // namespace tokenspeed::server

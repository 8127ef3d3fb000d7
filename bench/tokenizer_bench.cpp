// Tokenizer throughput on one core: tokenizer_bench [DIRECTORY_OF_TOKENIZER_JSON [TEXT_FILE]].
// Defaults: the demo model's tokenizer and the Markdown files of this repository. "first" is a text that a tokenizer
// fresh from its file meets for the first time; "again" is the same text once more: the tokenizer remembers one byte
// for each vocabulary entry (whether its own merges give it), and the processor's caches are warm. Best of kRounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>

#include "base/mapped_file.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace {

using namespace tokenspeed;
constexpr int kRounds = 7;
const std::string kSource = TOKENSPEED_SOURCE_DIR;

std::string repository_text() {
  std::string text;
  for (const char* folder : {"docs", "models", "tests/goldens"}) {
    const std::filesystem::path path = std::filesystem::path(kSource) / folder;
    if (!std::filesystem::exists(path)) continue;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
      if (entry.path().extension() == ".md") text += read_file(entry.path().string()).value();
    }
  }
  return text;
}

template <typename Call>
double seconds(const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string directory = argc > 1 ? argv[1] : kSource + "/models/demo";
  const std::string text = argc > 2 ? read_file(argv[2]).value() : repository_text();
  double load = 1e9, first = 1e9, again = 1e9, decode = 1e9, stream = 1e9;
  size_t tokens = 0;
  for (int round = 0; round < kRounds; ++round) {
    auto tokenizer = text::Tokenizer::parse("{}");
    load = std::min(load, seconds([&] { tokenizer = text::Tokenizer::load(directory); }));
    if (!tokenizer.ok()) {
      std::fprintf(stderr, "%s\n", tokenizer.status().to_string().c_str());
      return 1;
    }
    std::vector<int32_t> ids;
    first = std::min(first, seconds([&] { ids = tokenizer->encode(text).value(); }));
    again = std::min(again, seconds([&] { ids = tokenizer->encode(text).value(); }));
    decode = std::min(decode, seconds([&] { (void)tokenizer->decode(ids, false); }));
    text::StreamingDetokenizer detokenizer(*tokenizer, false);
    stream = std::min(stream, seconds([&] {
                        for (const int32_t id : ids) (void)detokenizer.push(id);
                      }));
    tokens = ids.size();
  }
  const double megabytes = static_cast<double>(text.size()) / 1e6;
  std::printf("%s: loaded in %.3f s; %.2f MB of text, %zu tokens\n", directory.c_str(), load, megabytes, tokens);
  std::printf("encode, first: %.1f MB/s\nencode, again: %.1f MB/s\n", megabytes / first, megabytes / again);
  std::printf("decode: %.1f MB/s\nstreamed: %.0f ns per token\n", megabytes / decode,
              stream / static_cast<double>(tokens) * 1e9);
  return 0;
}

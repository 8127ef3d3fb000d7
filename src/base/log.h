// Logging for the whole program: spdlog on stderr, so that stdout stays the program's answer.
#pragma once

#include <spdlog/spdlog.h>

namespace tokenspeed {

// Sets up the process-wide logger. level: trace, debug, info, warning, error.
void initialize_logging(const std::string& level);

}  // namespace tokenspeed

// Errors as values. A Status carries a code (what kind of failure, which the HTTP layer maps to a status) and one
// sentence for the user that names the thing, the value, the limit and the remedy. Exceptions never cross a room.
// Cost: an ok Status is one null pointer; nothing is allocated on success.
#pragma once

#include <cassert>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace tokenspeed {

enum class StatusCode {
  kOk,
  kInvalidArgument,     // the caller's input is wrong; HTTP 400
  kNotFound,            // the named thing does not exist; HTTP 404
  kResourceExhausted,   // a queue, pool or memory is full; HTTP 429
  kFailedPrecondition,  // the system is not in a state for this (e.g. port in use, model has no tokenizer)
  kDataLoss,            // a file is truncated, lies or is corrupt
  kUnimplemented,       // understood, not supported; the message says what is
  kCancelled,           // the client went away
  kUnavailable,         // shutting down or not ready; HTTP 503
  kInternal,            // a bug or a fault of the machine; HTTP 500
};

std::string_view status_code_name(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : rep_(std::make_unique<Rep>(Rep{code, std::move(message), {}})) {
    assert(code != StatusCode::kOk);
  }
  Status(const Status& other) : rep_(other.rep_ ? std::make_unique<Rep>(*other.rep_) : nullptr) {}
  Status& operator=(const Status& other) {
    if (this != &other) rep_ = other.rep_ ? std::make_unique<Rep>(*other.rep_) : nullptr;
    return *this;
  }
  Status(Status&&) noexcept = default;
  Status& operator=(Status&&) noexcept = default;

  bool ok() const { return rep_ == nullptr; }
  StatusCode code() const { return rep_ ? rep_->code : StatusCode::kOk; }
  const std::string& message() const;
  // The request field at fault ("temperature", "messages[2].role"), empty when none: OpenAI's error object's `param`.
  const std::string& param() const;
  // Returns this error with `param` set.
  Status with_param(std::string param) &&;
  // Returns this error with "context: " before its message; ok stays ok.
  Status with_context(std::string_view context) &&;
  std::string to_string() const;

 private:
  struct Rep {
    StatusCode code;
    std::string message;
    std::string param;
  };
  std::unique_ptr<Rep> rep_;
};

Status invalid_argument(std::string message);
Status not_found(std::string message);
Status resource_exhausted(std::string message);
Status failed_precondition(std::string message);
Status data_loss(std::string message);
Status unimplemented(std::string message);
Status unavailable(std::string message);
Status internal_error(std::string message);

// A T or the Status that says why there is none. value() on an error is a programming mistake and asserts.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT: implicit on purpose, `return value;`
  Result(Status status) : status_(std::move(status)) {  // NOLINT: implicit on purpose, `return error;`
    assert(!status_.ok());
  }
  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() & {
    assert(ok());
    return *value_;
  }
  const T& value() const& {
    assert(ok());
    return *value_;
  }
  T&& value() && {
    assert(ok());
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace tokenspeed

#define TS_CONCAT_INNER(a, b) a##b
#define TS_CONCAT(a, b) TS_CONCAT_INNER(a, b)
// Returns the error of `expression` (a Status) from the enclosing function, if it is one.
#define TS_RETURN_IF_ERROR(expression)                                                    \
  do {                                                                                    \
    if (::tokenspeed::Status ts_status = (expression); !ts_status.ok()) return ts_status; \
  } while (false)
// TS_ASSIGN_OR_RETURN(auto x, f()): binds the value of a Result or returns its error.
#define TS_ASSIGN_OR_RETURN(declaration, expression) \
  TS_ASSIGN_OR_RETURN_INNER(TS_CONCAT(ts_result_, __LINE__), declaration, expression)
#define TS_ASSIGN_OR_RETURN_INNER(result, declaration, expression) \
  auto result = (expression);                                      \
  if (!result.ok()) return result.status();                        \
  declaration = std::move(result).value()

// Runs a parsed template over a request's variables. One interpreter per rendering; the tree is only read.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "text/jinja_ast.h"
#include "text/jinja_budget.h"
#include "text/jinja_builtins.h"
#include "text/jinja_objects.h"

namespace tokenspeed::text::jinja {

class Interpreter {
 public:
  // `variables` must outlive the interpreter.
  Interpreter(const Dict& variables, const Limits& limits) : variables_(variables), budget_(limits) {}
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  // Call once. Throws TemplateError with the line.
  std::string run(const Block& block);

 private:
  enum class Flow { kNormal, kBreak, kContinue };
  class Entered;

  Flow execute(const Block& block);
  Flow execute(const Statement& statement);
  void execute_for(const Statement& statement);
  bool loop_pass(const Statement& statement, const Value& loop, const Value& item);
  std::string captured(const Block& block);
  void assign(const Target& target, Value value, bool from_set);
  void define_macro(const MacroNode& node);
  void write(std::string_view text);

  Value evaluate(const Expression& node);
  Value evaluate_optional(const ExpressionPointer& node);
  Value dict_literal(const Expression& node);
  Value attribute(const Value& object, const std::string& name);
  Value loop_attribute(const Value& object, const std::string& name);
  bool comparison(const Expression& node);
  Value concatenation(const Expression& node);
  Value call(const Expression& node);
  Value call_value(const Value& callee, const Arguments& arguments);
  Value call_global(GlobalFunction function, const Arguments& arguments);
  Value call_macro(const Macro& macro, const Arguments& arguments);
  Value range(const Arguments& arguments);
  Value filter(const Expression& node, const Value& input);
  Value block_filters(const Expression& node, const Value& text);
  Arguments arguments(const Expression& node, size_t first);
  Value variable(const std::string& name);

  Scope* enter_scope(Scope* parent);
  void leave_scope(Scope* scope, Scope* previous);

  const Dict& variables_;
  Budget budget_;
  std::deque<Scope> scopes_;
  std::vector<Scope*> free_scopes_;
  std::deque<Namespace> namespaces_;
  std::deque<Macro> macros_;
  Scope* scope_ = nullptr;
  std::string* out_ = nullptr;
  int line_ = 0;
  int recursion_ = 0;
};

}  // namespace tokenspeed::text::jinja

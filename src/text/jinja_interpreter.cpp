#include "text/jinja_interpreter.h"

#include <algorithm>
#include <utility>

#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {

// One level of recursion: counts it, spends a step, and remembers the line for errors.
class Interpreter::Entered {
 public:
  Entered(Interpreter& interpreter, int line) : interpreter_(interpreter) {
    interpreter.line_ = line;
    interpreter.budget_.step();
    if (interpreter.recursion_ >= interpreter.budget_.limits().recursion) {
      throw TemplateError("macros call each other too deeply");
    }
    ++interpreter.recursion_;
  }
  ~Entered() { --interpreter_.recursion_; }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  Interpreter& interpreter_;
};

std::string Interpreter::run(const Block& block) {
  std::string out;
  out_ = &out;
  scope_ = enter_scope(nullptr);
  try {
    execute(block);
  } catch (TemplateError& error) {
    if (error.line == 0) error.line = line_;
    throw;
  }
  return out;
}

Scope* Interpreter::enter_scope(Scope* parent) {
  if (free_scopes_.empty()) free_scopes_.push_back(&scopes_.emplace_back());
  Scope* scope = free_scopes_.back();
  free_scopes_.pop_back();
  scope->parent = parent;
  return scope;
}

void Interpreter::leave_scope(Scope* scope, Scope* previous) {
  scope_ = previous;
  if (scope->captured) return;
  scope->variables.clear();
  free_scopes_.push_back(scope);
}

void Interpreter::write(std::string_view text) {
  budget_.bytes(text.size());
  if (text.size() > budget_.limits().output_bytes - out_->size()) {
    throw TemplateError("the rendered text is longer than " + std::to_string(budget_.limits().output_bytes) + " bytes");
  }
  *out_ += text;
}

// --- Statements ---

Interpreter::Flow Interpreter::execute(const Block& block) {
  for (const auto& statement : block) {
    if (const Flow flow = execute(*statement); flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::execute(const Statement& statement) {
  const Entered entered(*this, statement.line);
  switch (statement.kind) {
    case StatementKind::kText:
      write(statement.text);
      break;
    case StatementKind::kPrint: {
      const Value value = evaluate(*statement.value);
      if (const std::string* text = value.text()) {
        write(*text);
      } else {
        budget_.bytes(value.weight());
        write(to_string(value));
      }
      break;
    }
    case StatementKind::kIf:
      return execute(evaluate(*statement.value).truthy() ? statement.body : statement.otherwise);
    case StatementKind::kFor:
      execute_for(statement);
      break;
    case StatementKind::kSet:
      assign(statement.target, evaluate(*statement.value), true);
      break;
    case StatementKind::kSetBlock:
    case StatementKind::kFilterBlock: {
      Value value = Value::string(captured(statement.body));
      if (statement.value != nullptr) value = block_filters(*statement.value, value);
      if (statement.kind == StatementKind::kSetBlock) {
        assign(statement.target, std::move(value), true);
      } else {
        write(to_string(value));
      }
      break;
    }
    case StatementKind::kMacro:
      define_macro(*statement.macro);
      break;
    case StatementKind::kBreak:
      return Flow::kBreak;
    case StatementKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

std::string Interpreter::captured(const Block& block) {
  std::string text;
  std::string* const out = std::exchange(out_, &text);
  Scope* const previous = scope_;
  Scope* const scope = scope_ = enter_scope(previous);
  execute(block);
  leave_scope(scope, previous);
  out_ = out;
  return text;
}

void Interpreter::execute_for(const Statement& statement) {
  ListPointer items = iterate(evaluate(*statement.value), budget_);
  if (statement.condition != nullptr) {
    std::vector<Value> kept;
    for (const Value& item : items->items) {
      Scope* const previous = scope_;
      Scope* const scope = scope_ = enter_scope(previous);
      assign(statement.target, item, false);
      if (evaluate(*statement.condition).truthy()) kept.push_back(item);
      leave_scope(scope, previous);
    }
    items = *Value::list(std::move(kept)).as<ListPointer>();
  }
  if (items->items.empty()) {
    execute(statement.otherwise);
    return;
  }
  auto state = std::make_shared<LoopState>();
  state->items = items;
  state->depth = items->depth + 1;
  const Value loop{Value::Storage(state)};
  for (; state->index < items->items.size(); ++state->index) {
    budget_.step();
    if (!loop_pass(statement, loop, items->items[state->index])) break;
  }
}

// One pass of a loop in a scope of its own; false after a break.
bool Interpreter::loop_pass(const Statement& statement, const Value& loop, const Value& item) {
  Scope* const previous = scope_;
  Scope* const scope = scope_ = enter_scope(previous);
  scope->set("loop", loop);
  assign(statement.target, item, false);
  const Flow flow = execute(statement.body);
  leave_scope(scope, previous);
  return flow != Flow::kBreak;
}

void Interpreter::assign(const Target& target, Value value, bool from_set) {
  if (!target.attribute.empty()) {
    const Value object = variable(target.names[0]);
    auto* const* space = object.as<Namespace*>();
    if (space == nullptr)
      throw TemplateError("cannot assign to an attribute of '" + target.names[0] + "': it is no namespace");
    (*space)->fields.set(target.attribute, std::move(value));
    return;
  }
  if (!target.unpack) {
    scope_->set(target.names[0], std::move(value));
    return;
  }
  require_defined(value);
  const ListPointer items = iterate(value, budget_);
  if (items->items.size() != target.names.size()) {
    throw TemplateError(std::string(from_set ? "set" : "for") + ": " + std::to_string(items->items.size()) +
                        " values do not fit " + std::to_string(target.names.size()) + " names");
  }
  for (size_t i = 0; i < target.names.size(); ++i) scope_->set(target.names[i], items->items[i]);
}

void Interpreter::define_macro(const MacroNode& node) {
  for (Scope* scope = scope_; scope != nullptr && !scope->captured; scope = scope->parent) scope->captured = true;
  macros_.push_back({&node, scope_});
  scope_->set(node.name, Value(Value::Storage(static_cast<const Macro*>(&macros_.back()))));
}

// --- Expressions ---

Value Interpreter::variable(const std::string& name) {
  for (const Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
    if (const Value* value = scope->find_own(name)) return *value;
  }
  if (const Value* value = variables_.find(name)) return *value;
  constexpr std::pair<std::string_view, GlobalFunction> kGlobals[] = {
      {"raise_exception", GlobalFunction::kRaiseException},
      {"namespace", GlobalFunction::kNamespace},
      {"range", GlobalFunction::kRange},
      {"dict", GlobalFunction::kDict}};
  for (const auto& [global, function] : kGlobals) {
    if (name == global) return Value(Value::Storage(function));
  }
  return Value::undefined("'" + name + "' is undefined");
}

Value Interpreter::evaluate_optional(const ExpressionPointer& node) {
  return node == nullptr ? Value() : evaluate(*node);
}

Value Interpreter::evaluate(const Expression& node) {
  const Entered entered(*this, node.line);
  const auto operand = [&](size_t i) { return evaluate(*node.operands[i]); };
  switch (node.kind) {
    case ExpressionKind::kConstant:
      return node.constant;
    case ExpressionKind::kName:
      return variable(node.name);
    case ExpressionKind::kList:
      return Value::list(arguments(node, 0).positional);
    case ExpressionKind::kTuple:
      return Value::tuple(arguments(node, 0).positional);
    case ExpressionKind::kDict:
      return dict_literal(node);
    case ExpressionKind::kAttribute:
      return attribute(operand(0), node.name);
    case ExpressionKind::kItem: {
      const Value object = operand(0);
      const Value key = operand(1);
      if (object.is_string()) budget_.bytes(object.weight() * 16);
      Value found = get_item(object, key);
      const bool use_attribute = found.is_undefined() && key.text() != nullptr && object.dict() == nullptr;
      return use_attribute ? attribute(object, *key.text()) : found;
    }
    case ExpressionKind::kSlice: {
      const Value object = operand(0);
      const Value start = evaluate_optional(node.operands[1]);
      const Value stop = evaluate_optional(node.operands[2]);
      return get_slice(object, start, stop, evaluate_optional(node.operands[3]), budget_);
    }
    case ExpressionKind::kCall:
      return call(node);
    case ExpressionKind::kFilter:
      return filter(node, operand(0));
    case ExpressionKind::kTest: {
      const Value input = operand(0);
      return Value::boolean(apply_test(node.name, input, arguments(node, 1), budget_));
    }
    case ExpressionKind::kNot:
      return Value::boolean(!operand(0).truthy());
    case ExpressionKind::kNegative:
      return negative(operand(0));
    case ExpressionKind::kPositive:
      return negative(negative(operand(0)));
    case ExpressionKind::kAnd: {
      Value left = operand(0);
      return left.truthy() ? operand(1) : left;
    }
    case ExpressionKind::kOr: {
      Value left = operand(0);
      return left.truthy() ? left : operand(1);
    }
    case ExpressionKind::kConditional:
      return operand(0).truthy() ? operand(1) : evaluate_optional(node.operands[2]);
    case ExpressionKind::kCompare:
      return Value::boolean(comparison(node));
    case ExpressionKind::kArithmetic: {
      const Value left = operand(0);
      return arithmetic(node.name, left, operand(1), budget_);
    }
    case ExpressionKind::kConcatenate:
      return concatenation(node);
  }
  return Value();
}

Value Interpreter::dict_literal(const Expression& node) {
  Dict dict;
  for (size_t i = 0; i < node.operands.size(); i += 2) {
    const Value key = evaluate(*node.operands[i]);
    if (key.text() == nullptr) throw TemplateError("keys of dicts must be strings in chat templates");
    dict.set(*key.text(), evaluate(*node.operands[i + 1]));
  }
  return Value::dict(std::move(dict));
}

Value Interpreter::attribute(const Value& object, const std::string& name) {
  require_defined(object);
  if (name.starts_with("__")) throw TemplateError("access to the attribute '" + name + "' is unsafe");
  if (object.as<std::shared_ptr<LoopState>>() != nullptr) return loop_attribute(object, name);
  if (has_method(object, name)) return Value::method(object, name);
  return get_item(object, Value::string(name));
}

Value Interpreter::loop_attribute(const Value& object, const std::string& name) {
  const LoopState& loop = **object.as<std::shared_ptr<LoopState>>();
  const int64_t index = static_cast<int64_t>(loop.index), size = static_cast<int64_t>(loop.items->items.size());
  const auto item = [&](int64_t i) {
    if (i < 0 || i >= size) return Value::undefined(i < 0 ? "there is no previous item" : "there is no next item");
    return loop.items->items[static_cast<size_t>(i)];
  };
  if (name == "index0") return Value::integer(index);
  if (name == "index") return Value::integer(index + 1);
  if (name == "first") return Value::boolean(index == 0);
  if (name == "last") return Value::boolean(index + 1 == size);
  if (name == "length") return Value::integer(size);
  if (name == "revindex") return Value::integer(size - index);
  if (name == "revindex0") return Value::integer(size - index - 1);
  if (name == "previtem") return item(index - 1);
  if (name == "nextitem") return item(index + 1);
  // depth counts recursive loops, which chat templates do not have: always the outermost.
  if (name == "depth") return Value::integer(1);
  if (name == "depth0") return Value::integer(0);
  if (name == "cycle") return Value::method(object, name);
  return Value::undefined("'loop' has no attribute '" + name + "'");
}

bool Interpreter::comparison(const Expression& node) {
  Value left = evaluate(*node.operands[0]);
  for (size_t i = 0; i < node.operators.size(); ++i) {
    Value right = evaluate(*node.operands[i + 1]);
    budget_.bytes(left.weight() + right.weight());
    const std::string& op = node.operators[i];
    bool holds;
    if (op == "==" || op == "!=") {
      holds = equal(left, right) == (op == "==");
    } else if (op == "in" || op == "not in") {
      holds = contains(right, left, budget_) == (op == "in");
    } else {
      require_defined(left);
      require_defined(right);
      const int order = compare(left, right);
      holds = (op[0] == '<' && order == -1) || (op[0] == '>' && order == 1) || (op.size() == 2 && order == 0);
    }
    if (!holds) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::concatenation(const Expression& node) {
  std::string out;
  for (const auto& operand : node.operands) {
    const Value value = evaluate(*operand);
    budget_.bytes(value.weight());
    out += to_string(value);
  }
  return Value::string(std::move(out));
}

Arguments Interpreter::arguments(const Expression& node, size_t first) {
  Arguments result;
  for (size_t i = first; i < node.operands.size(); ++i) result.positional.push_back(evaluate(*node.operands[i]));
  for (const auto& [name, value] : node.keywords) result.named.emplace_back(name, evaluate(*value));
  return result;
}

Value Interpreter::filter(const Expression& node, const Value& input) {
  const Arguments given = arguments(node, 1);
  line_ = node.line;
  return apply_filter(node.name, input, given, budget_);
}

// A block's chain of filters, the innermost of which has no operand and takes the block's text.
Value Interpreter::block_filters(const Expression& node, const Value& text) {
  const Expression* const inner = node.operands[0].get();
  return filter(node, inner == nullptr ? text : block_filters(*inner, text));
}

Value Interpreter::call(const Expression& node) {
  const Expression& callee = *node.operands[0];
  if (callee.kind == ExpressionKind::kAttribute) {
    const Value self = evaluate(*callee.operands[0]);
    if (has_method(self, callee.name)) {
      const Arguments given = arguments(node, 1);
      line_ = node.line;
      return call_method(self, callee.name, given, budget_);
    }
    const Value function = attribute(self, callee.name);
    return call_value(function, arguments(node, 1));
  }
  const Value function = evaluate(callee);
  const Arguments given = arguments(node, 1);
  line_ = node.line;
  return call_value(function, given);
}

Value Interpreter::call_value(const Value& callee, const Arguments& arguments) {
  require_defined(callee);
  if (const auto* macro = callee.as<const Macro*>()) return call_macro(**macro, arguments);
  if (const auto* function = callee.as<GlobalFunction>()) return call_global(*function, arguments);
  if (const auto* method = callee.as<std::shared_ptr<const Method>>()) {
    const auto* loop = (*method)->self.as<std::shared_ptr<LoopState>>();
    if (loop == nullptr) return call_method((*method)->self, (*method)->name, arguments, budget_);
    if (arguments.positional.empty()) throw TemplateError("loop.cycle() needs arguments");
    return arguments.positional[(*loop)->index % arguments.positional.size()];
  }
  throw TemplateError("a value of the type '" + std::string(callee.type_name()) + "' cannot be called");
}

Value Interpreter::call_global(GlobalFunction function, const Arguments& arguments) {
  if (function == GlobalFunction::kRange) return range(arguments);
  if (function == GlobalFunction::kRaiseException) {
    arguments.check("raise_exception", 1, {"message"});
    const Value* message = arguments.find(0, "message");
    throw TemplateError(message == nullptr ? "the template raised an exception" : to_string(*message), line_, true);
  }
  if (arguments.positional.size() > 1) throw TemplateError("dict() and namespace() take at most one mapping");
  Dict dict;
  if (!arguments.positional.empty()) {
    const Dict* start = arguments.positional[0].dict();
    if (start == nullptr) throw TemplateError("dict() and namespace() start from a mapping");
    budget_.bytes(start->entries.size() * 64);
    dict = *start;
  }
  for (const auto& [name, value] : arguments.named) dict.set(name, value);
  if (function == GlobalFunction::kDict) return Value::dict(std::move(dict));
  return Value(Value::Storage(&namespaces_.emplace_back(Namespace{std::move(dict)})));
}

Value Interpreter::range(const Arguments& arguments) {
  arguments.check("range", 3);
  int64_t bounds[3] = {0, 0, 1};
  const size_t count = arguments.positional.size();
  if (count == 0) throw TemplateError("range() needs an argument");
  for (size_t i = 0; i < count; ++i) {
    const auto* bound = arguments.positional[i].as<int64_t>();
    if (bound == nullptr) throw TemplateError("range() needs integers");
    bounds[count == 1 ? 1 : i] = *bound;
  }
  if (bounds[2] == 0) throw TemplateError("range() by a step of 0");
  constexpr size_t kMost = 100'000;  // as Jinja's sandbox
  std::vector<Value> items;
  for (int64_t i = bounds[0]; bounds[2] > 0 ? i < bounds[1] : i > bounds[1];) {
    if (items.size() == kMost) throw TemplateError("range() is longer than " + std::to_string(kMost));
    budget_.step();
    items.push_back(Value::integer(i));
    if (__builtin_add_overflow(i, bounds[2], &i)) break;
  }
  return Value::list(std::move(items));
}

Value Interpreter::call_macro(const Macro& macro, const Arguments& arguments) {
  const MacroNode& node = *macro.node;
  const Entered entered(*this, line_);
  const int line = line_;
  if (arguments.positional.size() > node.parameters.size()) {
    throw TemplateError("macro '" + node.name + "' takes at most " + std::to_string(node.parameters.size()) +
                        " arguments");
  }
  for (const auto& [name, value] : arguments.named) {
    const auto found = std::ranges::find(node.parameters, name);
    if (found == node.parameters.end()) throw TemplateError("macro '" + node.name + "' has no argument '" + name + "'");
    if (found - node.parameters.begin() < static_cast<ptrdiff_t>(arguments.positional.size())) {
      throw TemplateError("macro '" + node.name + "' got the argument '" + name + "' twice");
    }
  }
  Scope* const previous = scope_;
  Scope* const scope = scope_ = enter_scope(macro.scope);
  const size_t first_default = node.parameters.size() - node.defaults.size();
  for (size_t i = 0; i < node.parameters.size(); ++i) {
    const Value* given = arguments.find(i, node.parameters[i]);
    if (given != nullptr) {
      scope->set(node.parameters[i], *given);
    } else if (i >= first_default) {
      scope->set(node.parameters[i], evaluate(*node.defaults[i - first_default]));
    } else {
      scope->set(node.parameters[i], Value::undefined("parameter '" + node.parameters[i] + "' was not provided"));
    }
  }
  std::string text;
  std::string* const out = std::exchange(out_, &text);
  execute(node.body);
  out_ = out;
  leave_scope(scope, previous);
  line_ = line;
  return Value::string(std::move(text));
}

}  // namespace tokenspeed::text::jinja

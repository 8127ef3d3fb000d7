// The parsed template. Immutable after parsing, so that any number of threads may render it at once.
// No tree is higher than kMaximumDepth: the parser refuses it, so recursive walks are safe.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

struct Expression;
using ExpressionPointer = std::unique_ptr<Expression>;

enum class ExpressionKind {
  kConstant,
  kName,
  kList,
  kTuple,
  kDict,       // operands: key, value, key, value ...
  kAttribute,  // operands[0].name
  kItem,       // operands[0][operands[1]]
  kSlice,      // operands[0][operands[1]:operands[2]:operands[3]], parts may be null
  kCall,       // operands[0](operands[1] ..., keywords)
  kFilter,     // operands[0] | name(operands[1] ..., keywords)
  kTest,       // operands[0] is name(operands[1] ...)
  kNot,
  kNegative,
  kPositive,
  kAnd,
  kOr,
  kConditional,  // operands: condition, value, other value or null
  kCompare,      // operands[0] operators[0] operands[1] operators[1] ...
  kArithmetic,   // operands[0] name operands[1]
  kConcatenate,
};

struct Expression {
  ExpressionKind kind;
  int line;
  int height = 1;
  Value constant;
  std::string name;
  std::vector<ExpressionPointer> operands;
  std::vector<std::string> operators;
  std::vector<std::pair<std::string, ExpressionPointer>> keywords;
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

enum class StatementKind { kText, kPrint, kIf, kFor, kSet, kSetBlock, kFilterBlock, kMacro, kBreak, kContinue };

// What a `set` or `for` assigns to: one name, several to unpack into, or an attribute of a namespace.
struct Target {
  std::vector<std::string> names;
  bool unpack = false;
  std::string attribute;  // names[0].attribute when not empty
};

struct MacroNode {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<ExpressionPointer> defaults;  // of the last parameters
  Block body;
};

struct Statement {
  StatementKind kind;
  int line;
  int height = 1;
  std::string text;
  ExpressionPointer value;  // printed, tested, looped over or assigned; of a filter block and set block: may be null
  ExpressionPointer condition;  // of `for ... if`
  Target target;
  Block body;
  Block otherwise;
  std::unique_ptr<MacroNode> macro;
};

}  // namespace tokenspeed::text::jinja

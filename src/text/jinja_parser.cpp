#include "text/jinja_parser.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>

#include "text/jinja_lexer.h"

namespace tokenspeed::text::jinja {
namespace {

void check_height(int height, int line) {
  if (height > kMaximumDepth) {
    throw TemplateError("the template nests deeper than " + std::to_string(kMaximumDepth) + " levels", line);
  }
}

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Block parse() {
    Block block = statements({});
    return block;
  }

 private:
  // Counts the parser's own recursion, which comes before any tree whose height could be checked.
  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) { check_height(++parser_.depth_, parser_.current().line); }
    ~Nested() { --parser_.depth_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    Parser& parser_;
  };

  const Token& current() const { return tokens_[position_]; }
  const Token& ahead() const { return tokens_[std::min(position_ + 1, tokens_.size() - 1)]; }
  Token take() { return tokens_[position_ + 1 < tokens_.size() ? position_++ : position_]; }
  bool at(TokenKind kind) const { return current().kind == kind; }
  bool at_operator(std::string_view text) const { return at(TokenKind::kOperator) && current().text == text; }
  bool at_name(std::string_view text) const { return at(TokenKind::kName) && current().text == text; }
  bool skip_operator(std::string_view text) { return at_operator(text) && (take(), true); }
  bool skip_name(std::string_view text) { return at_name(text) && (take(), true); }

  [[noreturn]] void fail(const std::string& message) const { throw TemplateError(message, current().line); }
  std::string describe() const {
    switch (current().kind) {
      case TokenKind::kEnd:
        return "the end of the template";
      case TokenKind::kBlockEnd:
        return "'%}'";
      case TokenKind::kVariableEnd:
        return "'}}'";
      case TokenKind::kString:
        return "a string";
      default:
        return "'" + current().text + "'";
    }
  }
  void expect_operator(std::string_view text) {
    if (!skip_operator(text)) fail("expected '" + std::string(text) + "', found " + describe());
  }
  std::string expect_name() {
    if (!at(TokenKind::kName)) fail("expected a name, found " + describe());
    return take().text;
  }
  void expect_end_of_block() {
    if (!at(TokenKind::kBlockEnd)) fail("expected '%}', found " + describe());
    take();
  }

  // --- Statements ---

  // Until a block that starts with one of `ends`, whose opening and name are consumed; with no ends, to the source's
  // end.
  Block statements(std::initializer_list<std::string_view> ends) {
    const Nested nested(*this);
    Block block;
    const int start_line = current().line;
    while (!at(TokenKind::kEnd)) {
      const Token token = take();
      if (token.kind == TokenKind::kData) {
        block.push_back(make_statement(StatementKind::kText, token.line));
        block.back()->text = token.text;
      } else if (token.kind == TokenKind::kVariableBegin) {
        auto statement = make_statement(StatementKind::kPrint, token.line);
        statement->value = tuple_or_expression({});
        if (!at(TokenKind::kVariableEnd)) fail("expected '}}', found " + describe());
        take();
        add(block, std::move(statement));
      } else {
        if (at(TokenKind::kName) && std::ranges::find(ends, current().text) != ends.end()) {
          end_name_ = take().text;
          return block;
        }
        statement(block, token.line);
      }
    }
    if (ends.size() != 0) {
      throw TemplateError("the block has no '" + std::string(*(ends.end() - 1)) + "'", start_line);
    }
    return block;
  }

  static std::unique_ptr<Statement> make_statement(StatementKind kind, int line) {
    auto statement = std::make_unique<Statement>();
    statement->kind = kind;
    statement->line = line;
    return statement;
  }

  static int height_of(const Block& block) {
    int height = 0;
    for (const auto& statement : block) height = std::max(height, statement->height);
    return height;
  }

  static void add(Block& block, std::unique_ptr<Statement> statement) {
    int height = std::max(height_of(statement->body), height_of(statement->otherwise));
    if (statement->value != nullptr) height = std::max(height, statement->value->height);
    if (statement->condition != nullptr) height = std::max(height, statement->condition->height);
    if (statement->macro != nullptr) {
      height = std::max(height, height_of(statement->macro->body));
      for (const auto& value : statement->macro->defaults) height = std::max(height, value->height);
    }
    statement->height = height + 1;
    check_height(statement->height, statement->line);
    block.push_back(std::move(statement));
  }

  void statement(Block& block, int line) {
    const std::string name = expect_name();
    if (name == "if") return add(block, if_statement(line));
    if (name == "for") return add(block, for_statement(line));
    if (name == "set") return add(block, set_statement(line));
    if (name == "macro") return add(block, macro_statement(line));
    if (name == "filter") return add(block, filter_statement(line));
    if (name == "print") {
      auto result = make_statement(StatementKind::kPrint, line);
      result->value = tuple_or_expression({});
      expect_end_of_block();
      return add(block, std::move(result));
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) throw TemplateError("'" + name + "' outside a loop", line);
      expect_end_of_block();
      return add(block, make_statement(name == "break" ? StatementKind::kBreak : StatementKind::kContinue, line));
    }
    throw TemplateError("the tag '" + name + "' is unknown or not supported in chat templates", line);
  }

  std::unique_ptr<Statement> if_statement(int line) {
    const Nested nested(*this);
    auto result = make_statement(StatementKind::kIf, line);
    result->value = tuple_or_expression({}, false);
    expect_end_of_block();
    result->body = statements({"elif", "else", "endif"});
    if (end_name_ == "elif") {
      add(result->otherwise, if_statement(current().line));
      return result;  // the inner one consumed the endif
    }
    if (end_name_ == "else") {
      expect_end_of_block();
      result->otherwise = statements({"endif"});
    }
    expect_end_of_block();
    return result;
  }

  std::unique_ptr<Statement> for_statement(int line) {
    auto result = make_statement(StatementKind::kFor, line);
    result->target = target();
    if (!result->target.attribute.empty()) fail("a loop cannot assign to an attribute");
    if (!skip_name("in")) fail("expected 'in', found " + describe());
    result->value = tuple_or_expression({"recursive"}, false);
    if (skip_name("if")) result->condition = expression();
    if (at_name("recursive")) fail("recursive loops are not supported in chat templates");
    expect_end_of_block();
    ++loops_;
    result->body = statements({"else", "endfor"});
    --loops_;
    if (end_name_ == "else") {
      expect_end_of_block();
      result->otherwise = statements({"endfor"});
    }
    expect_end_of_block();
    return result;
  }

  Target target() {
    Target result;
    const bool parenthesized = skip_operator("(");
    result.names.push_back(assignable_name());
    if (!parenthesized && skip_operator(".")) {
      result.attribute = expect_name();
      return result;
    }
    while (skip_operator(",")) {
      result.unpack = true;
      if (!at(TokenKind::kName) || at_name("in")) break;
      result.names.push_back(assignable_name());
    }
    if (parenthesized) expect_operator(")");
    return result;
  }

  std::string assignable_name() {
    for (const std::string_view constant : {"true", "false", "none", "True", "False", "None"}) {
      if (at_name(constant)) fail("cannot assign to " + describe());
    }
    return expect_name();
  }

  std::unique_ptr<Statement> set_statement(int line) {
    auto result = make_statement(StatementKind::kSet, line);
    result->target = target();
    if (skip_operator("=")) {
      result->value = tuple_or_expression({});
      expect_end_of_block();
      return result;
    }
    result->kind = StatementKind::kSetBlock;
    if (at_operator("|")) result->value = block_filters(nullptr);
    expect_end_of_block();
    result->body = statements({"endset"});
    expect_end_of_block();
    return result;
  }

  std::unique_ptr<Statement> filter_statement(int line) {
    auto result = make_statement(StatementKind::kFilterBlock, line);
    result->value = block_filters(filter(nullptr));
    expect_end_of_block();
    result->body = statements({"endfilter"});
    expect_end_of_block();
    return result;
  }

  std::unique_ptr<Statement> macro_statement(int line) {
    auto result = make_statement(StatementKind::kMacro, line);
    result->macro = std::make_unique<MacroNode>();
    MacroNode& macro = *result->macro;
    macro.name = assignable_name();
    expect_operator("(");
    while (!at_operator(")")) {
      if (!macro.parameters.empty()) expect_operator(",");
      macro.parameters.push_back(assignable_name());
      if (skip_operator("=")) {
        macro.defaults.push_back(expression());
      } else if (!macro.defaults.empty()) {
        fail("a parameter without default follows one with a default");
      }
    }
    expect_operator(")");
    expect_end_of_block();
    const int loops = std::exchange(loops_, 0);
    macro.body = statements({"endmacro"});
    loops_ = loops;
    expect_end_of_block();
    return result;
  }

  // --- Expressions, loosest binding first ---

  static ExpressionPointer make(ExpressionKind kind, int line) {
    auto result = std::make_unique<Expression>();
    result->kind = kind;
    result->line = line;
    return result;
  }

  static ExpressionPointer seal(ExpressionPointer node) {
    int height = 0;
    for (const auto& operand : node->operands) height = operand ? std::max(height, operand->height) : height;
    for (const auto& [name, value] : node->keywords) height = std::max(height, value->height);
    node->height = height + 1;
    check_height(node->height, node->line);
    return node;
  }

  template <typename... Operands>
  static ExpressionPointer make(ExpressionKind kind, int line, std::string name, Operands... operands) {
    auto result = make(kind, line);
    result->name = std::move(name);
    (result->operands.push_back(std::move(operands)), ...);
    return seal(std::move(result));
  }

  // "a, b" without parentheses makes a tuple.
  ExpressionPointer tuple_or_expression(std::initializer_list<std::string_view> ends, bool conditional = true,
                                        bool parenthesized = false) {
    const int line = current().line;
    std::vector<ExpressionPointer> items;
    bool is_tuple = false;
    while (true) {
      if (at(TokenKind::kVariableEnd) || at(TokenKind::kBlockEnd) || at_operator(")")) break;
      if (at(TokenKind::kName) && std::ranges::find(ends, current().text) != ends.end()) break;
      items.push_back(conditional ? expression() : or_expression());
      if (!skip_operator(",")) break;
      is_tuple = true;
    }
    if (!is_tuple && !items.empty()) return std::move(items[0]);
    if (!is_tuple && !parenthesized) fail("expected an expression, found " + describe());
    auto tuple = make(ExpressionKind::kTuple, line);
    tuple->operands = std::move(items);
    return seal(std::move(tuple));
  }

  ExpressionPointer expression() {
    const Nested nested(*this);
    auto result = or_expression();
    while (at_name("if")) {
      const int line = take().line;
      auto condition = or_expression();
      ExpressionPointer other;
      if (skip_name("else")) other = expression();
      result = make(ExpressionKind::kConditional, line, "", std::move(condition), std::move(result), std::move(other));
    }
    return result;
  }

  ExpressionPointer or_expression() {
    auto left = and_expression();
    while (at_name("or")) {
      const int line = take().line;
      left = make(ExpressionKind::kOr, line, "", std::move(left), and_expression());
    }
    return left;
  }

  ExpressionPointer and_expression() {
    auto left = not_expression();
    while (at_name("and")) {
      const int line = take().line;
      left = make(ExpressionKind::kAnd, line, "", std::move(left), not_expression());
    }
    return left;
  }

  ExpressionPointer not_expression() {
    const Nested nested(*this);
    if (!at_name("not")) return comparison();
    const int line = take().line;
    return make(ExpressionKind::kNot, line, "", not_expression());
  }

  // The comparison operator here, consumed, or "".
  std::string comparison_operator() {
    for (const std::string_view text : {"==", "!=", "<", "<=", ">", ">="}) {
      if (at_operator(text)) return take().text;
    }
    if (at_name("in")) return take().text;
    if (at_name("not") && ahead().kind == TokenKind::kName && ahead().text == "in") {
      take();
      take();
      return "not in";
    }
    return "";
  }

  ExpressionPointer comparison() {
    const int line = current().line;
    auto first = sum();
    std::string op = comparison_operator();
    if (op.empty()) return first;
    auto result = make(ExpressionKind::kCompare, line);
    result->operands.push_back(std::move(first));
    for (; !op.empty(); op = comparison_operator()) {
      result->operators.push_back(op);
      result->operands.push_back(sum());
    }
    return seal(std::move(result));
  }

  ExpressionPointer sum() {
    auto left = concatenation();
    while (at_operator("+") || at_operator("-")) {
      const Token op = take();
      left = make(ExpressionKind::kArithmetic, op.line, op.text, std::move(left), concatenation());
    }
    return left;
  }

  ExpressionPointer concatenation() {
    const int line = current().line;
    auto first = product();
    if (!at_operator("~")) return first;
    auto result = make(ExpressionKind::kConcatenate, line);
    result->operands.push_back(std::move(first));
    while (skip_operator("~")) result->operands.push_back(product());
    return seal(std::move(result));
  }

  ExpressionPointer product() {
    auto left = power();
    while (at_operator("*") || at_operator("/") || at_operator("//") || at_operator("%")) {
      const Token op = take();
      left = make(ExpressionKind::kArithmetic, op.line, op.text, std::move(left), power());
    }
    return left;
  }

  ExpressionPointer power() {
    auto left = unary(true);
    while (at_operator("**")) {
      const int line = take().line;
      left = make(ExpressionKind::kArithmetic, line, "**", std::move(left), unary(true));
    }
    return left;
  }

  // Filters bind looser than a sign (-1|abs is (-1)|abs), so only the outermost sign takes them.
  ExpressionPointer unary(bool with_filters) {
    const Nested nested(*this);
    ExpressionPointer result;
    if (at_operator("-") || at_operator("+")) {
      const Token op = take();
      result = make(op.text == "-" ? ExpressionKind::kNegative : ExpressionKind::kPositive, op.line, "", unary(false));
    } else {
      result = primary();
    }
    result = postfix(std::move(result));
    return with_filters ? filters(std::move(result)) : std::move(result);
  }

  ExpressionPointer constant(Value value, int line) {
    auto result = make(ExpressionKind::kConstant, line);
    result->constant = std::move(value);
    return result;
  }

  ExpressionPointer primary() {
    const Token token = current();
    switch (token.kind) {
      case TokenKind::kName:
        take();
        if (token.text == "true" || token.text == "True") return constant(Value::boolean(true), token.line);
        if (token.text == "false" || token.text == "False") return constant(Value::boolean(false), token.line);
        if (token.text == "none" || token.text == "None") return constant(Value::none(), token.line);
        return make(ExpressionKind::kName, token.line, token.text);
      case TokenKind::kString: {
        std::string text;
        while (at(TokenKind::kString)) text += take().text;
        return constant(Value::string(std::move(text)), token.line);
      }
      case TokenKind::kInteger:
        take();
        return constant(Value::integer_text(token.text), token.line);
      case TokenKind::kFloat:
        take();
        return constant(Value::number(float_value(token.text)), token.line);
      default:
        if (skip_operator("(")) {
          auto result = tuple_or_expression({}, true, true);
          expect_operator(")");
          return result;
        }
        if (skip_operator("[")) return list(token.line);
        if (skip_operator("{")) return dict(token.line);
        fail("unexpected " + describe());
    }
  }

  static double float_value(const std::string& text) {
    double value = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
    if (parsed.ec == std::errc::result_out_of_range) {
      const size_t mark = text.find_first_of("eE");
      return mark != std::string::npos && text[mark + 1] == '-' ? 0 : HUGE_VAL;
    }
    return value;
  }

  ExpressionPointer list(int line) {
    auto result = make(ExpressionKind::kList, line);
    while (!at_operator("]")) {
      result->operands.push_back(expression());
      if (!at_operator("]")) expect_operator(",");
    }
    take();
    return seal(std::move(result));
  }

  ExpressionPointer dict(int line) {
    auto result = make(ExpressionKind::kDict, line);
    while (!at_operator("}")) {
      result->operands.push_back(expression());
      expect_operator(":");
      result->operands.push_back(expression());
      if (!at_operator("}")) expect_operator(",");
    }
    take();
    return seal(std::move(result));
  }

  ExpressionPointer postfix(ExpressionPointer node) {
    while (true) {
      const int line = current().line;
      if (skip_operator(".")) {
        if (at(TokenKind::kInteger)) {
          node =
              make(ExpressionKind::kItem, line, "", std::move(node), constant(Value::integer_text(take().text), line));
        } else {
          node = make(ExpressionKind::kAttribute, line, expect_name(), std::move(node));
        }
      } else if (skip_operator("[")) {
        node = subscript(std::move(node), line);
      } else if (at_operator("(")) {
        node = call(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExpressionPointer subscript(ExpressionPointer node, int line) {
    ExpressionPointer parts[3];
    size_t colons = 0;
    while (!at_operator("]")) {
      if (skip_operator(":")) {
        if (++colons > 2) fail("a slice has at most two ':'");
      } else if (parts[colons] == nullptr) {
        parts[colons] = expression();
      } else {
        fail("expected ']', found " + describe());
      }
    }
    take();
    if (colons > 0) {
      return make(ExpressionKind::kSlice, line, "", std::move(node), std::move(parts[0]), std::move(parts[1]),
                  std::move(parts[2]));
    }
    if (parts[0] == nullptr) fail("a subscript is empty");
    return make(ExpressionKind::kItem, line, "", std::move(node), std::move(parts[0]));
  }

  // "(a, b, name=c)" onto a call, filter or test.
  void arguments(Expression& node) {
    expect_operator("(");
    while (!at_operator(")")) {
      if (at_operator("*") || at_operator("**")) fail("'*' arguments are not supported in chat templates");
      if (at(TokenKind::kName) && ahead().kind == TokenKind::kOperator && ahead().text == "=") {
        std::string name = take().text;
        take();
        node.keywords.emplace_back(std::move(name), expression());
      } else if (!node.keywords.empty()) {
        fail("an argument follows a keyword argument");
      } else {
        node.operands.push_back(expression());
      }
      if (!at_operator(")")) expect_operator(",");
    }
    take();
  }

  ExpressionPointer call(ExpressionPointer callee) {
    auto result = make(ExpressionKind::kCall, current().line);
    result->operands.push_back(std::move(callee));
    arguments(*result);
    return seal(std::move(result));
  }

  // One filter, at its name. A null input stands for the text of a filter block.
  ExpressionPointer filter(ExpressionPointer input) {
    auto result = make(ExpressionKind::kFilter, current().line);
    result->name = expect_name();
    result->operands.push_back(std::move(input));
    if (at_operator("(")) arguments(*result);
    return seal(std::move(result));
  }

  // The chain of a block's filters, which no test and no call may interrupt.
  ExpressionPointer block_filters(ExpressionPointer node) {
    while (skip_operator("|")) node = filter(std::move(node));
    return node;
  }

  ExpressionPointer filters(ExpressionPointer node) {
    while (true) {
      if (skip_operator("|")) {
        node = filter(std::move(node));
      } else if (at_name("is")) {
        take();
        node = test(std::move(node));
      } else if (at_operator("(")) {
        node = call(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExpressionPointer test(ExpressionPointer input) {
    const int line = current().line;
    const bool negated = skip_name("not");
    auto result = make(ExpressionKind::kTest, line);
    result->name = expect_name();
    result->operands.push_back(std::move(input));
    const bool name_argument =
        at(TokenKind::kName) && !at_name("else") && !at_name("or") && !at_name("and") && !at_name("is");
    if (at_operator("(")) {
      arguments(*result);
    } else if (name_argument && at_name("if")) {
      // "x is string if y": Jinja would read `if` as the argument's name; no template can mean that.
    } else if (name_argument || at(TokenKind::kString) || at(TokenKind::kInteger) || at(TokenKind::kFloat) ||
               at_operator("[") || at_operator("{")) {
      result->operands.push_back(postfix(primary()));
    }
    result = seal(std::move(result));
    return negated ? make(ExpressionKind::kNot, line, "", std::move(result)) : std::move(result);
  }

  std::vector<Token> tokens_;
  size_t position_ = 0;
  int depth_ = 0;
  int loops_ = 0;
  std::string end_name_;
};

}  // namespace

Block parse_template(std::string_view source) { return Parser(tokenize(source)).parse(); }

}  // namespace tokenspeed::text::jinja

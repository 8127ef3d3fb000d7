#include <gtest/gtest.h>

#include <string>

#include "text/chat_template.h"

namespace tokenspeed::text {
namespace {

struct Case {
  const char* source;
  std::string expected;
};

// clang-format off
const char* const kRequest =
    R"~({"s": " a,b,,c ", "d": {"k": 1, "items": 2, "z": null}, "l": [1, 2.0, "x", null, true, {"a": [1.5]}], "n": -7, "f": 1e+16, "g": 1e-07, "h": 0.1, "big": 123456789012345678901234567890, "u": "h\u00e9llo w\u00f6rld", "q": "it's", "e": "", "t": true, "m": [{"r": "u"}, {"r": "a"}, {"r": "a"}], "c": "a\u0000\u001f\"\\\n\t\u007f<>&'\u00e9\u2028"})~";

// What Jinja2 3.1 renders for each source under the settings of chat templates.
const Case kRendered[] = {
    {R"~(a{% if t %}
b
{% endif %}
c
  {% if t %}  x  {% endif %}  
  {{ n }}  
y)~",
     std::string("ab\nc\n  x    \n  -7  \ny", 21)},
    {R"~(  {#- c -#}  x {#+ d #}
 z)~",
     std::string("x  z", 4)},
    {R"~(  {#- keep #}
  {# c #}
 {%+ if t %}p{% endif +%}
q
{%- if t -%}   
   r  
{%- endif %})~",
     std::string(" p\nqr", 5)},
    {R"~({% raw %} {{ x }} {% if %} {% endraw %}
z)~",
     std::string(" {{ x }} {% if %} z", 19)},
    {R"~({%- raw -%}   {{ x }}   {%- endraw -%}   z)~",
     std::string("{{ x }}z", 8)},
    {R"~({{ '}}' }}{{ {"a": {"b": 1}}["a"]["b"] }}{{ "%}" }})~",
     std::string("}}1%}", 5)},
    {R"~({{ s.split(',') }}{{ s.split() }}{{ s.strip().split(',', 1) }}{{ s|trim|upper }}{{ s.rstrip(' c') }}|{{ s.lstrip() }}|)~",
     std::string("[' a', 'b', '', 'c ']['a,b,,c']['a', 'b,,c']A,B,,C a,b,,|a,b,,c |", 65)},
    {R"~({{ d }}{{ l }}{{ [t, none, f, g, h, big, q, u, c, (1,), (1,2), {}] }})~",
     std::string("{'k': 1, 'items': 2, 'z': None}[1, 2.0, 'x', None, True, {'a': [1.5]}][True, None, 1e+16, 1e-07, 0.1, 123456789012345678901234567890, \"it's\", 'h\303\251llo w\303\266rld', 'a\\x00\\x1f\"\\\\\\n\\t\\x7f<>&\\'\303\251\\u2028', (1,), (1, 2), {}]", 213)},
    {R"~({{ d|tojson }}{{ l|tojson }}{{ c|tojson }}{{ [f, g, h, big, 1.0, -0.0, f * 1e308, -f * 1e308] |tojson }}{{ d|tojson(indent=2) }}{{ d|tojson(sort_keys=true) }}{{ []|tojson(indent=2) }})~",
     std::string("{\"k\": 1, \"items\": 2, \"z\": null}[1, 2.0, \"x\", null, true, {\"a\": [1.5]}]\"a\\u0000\\u001f\\\"\\\\\\n\\t\177<>&'\303\251\342\200\250\"[1e+16, 1e-07, 0.1, 123456789012345678901234567890, 1.0, -0.0, Infinity, -Infinity]{\n  \"k\": 1,\n  \"items\": 2,\n  \"z\": null\n}{\"items\": 2, \"k\": 1, \"z\": null}[]", 258)},
    {R"~({{ f }} {{ g }} {{ h }} {{ 1.0 }} {{ 123456.789 }} {{ 1e15 }} {{ 1e17 }} {{ 0.0001 }} {{ 0.00001 }} {{ 1e999 }} {{ 5e-324 }})~",
     std::string("1e+16 1e-07 0.1 1.0 123456.789 1000000000000000.0 1e+17 0.0001 1e-05 inf 5e-324", 79)},
    {R"~({{ 7 // 2 }} {{ n // 2 }} {{ n % 3 }} {{ 7 % -3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 'a' * 3 }} {{ [1] * 2 }} {{ [1] + [2] }} {{ 1 + true }} {{ 1 ~ 'a' ~ none ~ 1.0 }} {{ -2 ** 2 }} {{ 2 - 3 - 4 }})~",
     std::string("3 -4 2 -2 3.5 1024 0.5 3.0 0.5 aaa [1, 1] [1, 2] 2 1aNone1.0 4 -5", 65)},
    {R"~({{ 1 < 2 < 3 }} {{ 1 == 1.0 }} {{ true == 1 }} {{ 'a' < 'b' }} {{ 'k' in d }} {{ 'b' not in s }} {{ 2 in l }} {{ [1] == [1.0] }} {{ none == undefinedname }} {{ not t }} {{ not t or 5 }} {{ 0 and 1 }} {{ e or 'x' }} {{ 1 if e }} {{ 1 if e else 2 if t else 3 }})~",
     std::string("True True True True True False True True False False 5 0 x  2", 61)},
    {R"~({{ d.k }} {{ d['items'] }} {{ d.missing }} {{ d.get('k') }} {{ d.get('y', 3) }} {{ l[0] }} {{ l[-1] }} {{ l[99] }} {{ u[1] }} {{ u[-1] }} {{ l[1:3] }} {{ l[::-1] }} {{ u[::-1] }} {{ u[1:4] }} {{ u[-3:] }} {{ l[5:2:-1] }} {{ u[::2] }} {{ l.0 }})~",
     std::string("1 2  1 3 1 {'a': [1.5]}  \303\251 d [2.0, 'x'] [{'a': [1.5]}, True, None, 'x', 2.0, 1] dlr\303\266w oll\303\251h \303\251ll rld [{'a': [1.5]}, True, None] hlowrd 1", 139)},
    {R"~({% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}{% for k, v in d|items %}{{ k }}{{ v }}{% endfor %})~",
     std::string("k=1;items=2;z=None;kitemszk1items2zNone", 39)},
    {R"~({% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('o','e') }}
{% else %}none{% endfor %}{% for x in [] %}a{% else %}empty{% endfor %}{% for x in nothing %}a{% else %}empty{% endfor %})~",
     std::string("10TrueFalse6652.0o\n21FalseFalse6541xe\n32FalseFalse6432.0Noneo\n43FalseFalse632xTruee\n54FalseFalse621None{'a': [1.5]}o\n65FalseTrue610Truee\nemptyempty", 147)},
    {"{% for x in l if x is number %}{{ x }}/{{ loop.length }} {% endfor %}{% for c in 'h\303\251' %}[{{ c }}]{% endfor %}{% for i in range(2, 10, 3) %}{{ i }}{% endfor %}",
     std::string("1/3 2.0/3 True/3 [h][\303\251]258", 27)},
    {R"~({% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %})~",
     std::string("0134", 4)},
    {R"~({% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = i + 10 %}{{ x }}{% endfor %}{{ x }}{% set ns = namespace(a=1, b='q') %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }})~",
     std::string("11111214q", 9)},
    {R"~({% set a, b = 1, 2 %}{{ a }}{{ b }}{% set z %} hi {{ a }} {% endset %}[{{ z }}]{% set y | upper %}abc{% endset %}{{ y }}{% filter upper %}x{{ u }}{% endfilter %}{% if t %}{% set w = 3 %}{% endif %}{{ w }})~",
     std::string("12[ hi 1 ]ABCXH\303\211LLO W\303\226RLD3", 28)},
    {R"~({% macro f(a, b=2, c='z') %}[{{ a }}{{ b }}{{ c }}{{ g2 }}]{% endmacro %}{% set g2 = 9 %}{{ f(1) }}{{ f(1, c=3) }}{{ f() }}{{ f(1)|length }}{% macro r(n) %}{{ n }}{% if n > 0 %}{{ r(n - 1) }}{% endif %}{% endmacro %}{{ r(3) }})~",
     std::string("[12z9][1239][2z9]63210", 22)},
    {R"~({{ s is string }}{{ l is iterable }}{{ d is mapping }}{{ l is mapping }}{{ l is sequence }}{{ d is sequence }}{{ s is sequence }}{{ none is none }}{{ zz is defined }}{{ zz is undefined }}{{ t is true }}{{ 1 is true }}{{ t is not false }}{{ n is integer }}{{ f is float }}{{ t is number }}{{ t is boolean }}{{ n is odd }}{{ n is even }}{{ 6 is divisibleby 3 }}{{ 1 is eq 1 }}{{ 1 is in [1] }}{{ zz is iterable }}{{ d.q is none }}{{ n is iterable }}{{ 'a' is lower }}{{ f is callable }})~",
     std::string("TrueTrueTrueFalseTrueTrueTrueTrueFalseTrueTrueFalseTrueTrueTrueTrueTrueTrueFalseTrueTrueTrueTrueFalseFalseTrueFalse", 115)},
    {R"~({{ zz|default('x') }}{{ e|default('y', true) }}{{ e|default('y') }}|{{ zz|d }}|{{ l|length }}{{ u|length }}{{ d|count }}{{ [1,2]|join }}{{ [1,'a',none]|join(', ') }}{{ l|first }}{{ l|last }}{{ []|first }}{{ u|upper }}{{ u|capitalize }}{{ u|title }}{{ 'aXbX'|replace('X', '--') }}{{ 'aaa'|replace('a','b',2) }}{{ 'ab'|replace('','-') }}{{ '12'|int + 1 }}{{ 'x'|int(5) }}{{ '3.7'|int }}{{ '1.5'|float }}{{ -3|abs }}{{ -1.5|abs }}{{ [1,2]|reverse|list }}{{ 'abc'|reverse }}{{ 'xxaxx'|trim('x') }}{{ true|string }}{{ 1.0|string }}{{ d|string }}{{ none|string }}{{ 'a'|list }}{{ '<'|safe }})~",
     std::string("xy||6113121, a, None1{'a': [1.5]}H\303\211LLO W\303\226RLDH\303\251llo w\303\266rldH\303\251llo W\303\266rlda--b--bba-a-b-13531.531.5[2, 1]cbaaTrue1.0{'k': 1, 'items': 2, 'z': None}None['a']<", 155)},
    {"{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x','c')) }}{{ 'abc'.find('c') }}{{ 'aXa'.count('a') }}{{ 'abc'.upper() }}{{ '\303\200B'.lower() }}{{ ','.join(['a','b']) }}{{ 'a b'.title() }}{{ 'aB'.capitalize() }}{{ 'a\\nb\\r\\nc'.splitlines() }}{{ 'a.b'.replace('.', '!') }}{{ d.keys()|list }}{{ d.values()|list }}{{ [1,1].count(1) }}{{ [3,4].index(4) }}",
     std::string("TrueTrue22ABC\303\240ba,bA BAb['a', 'b', 'c']a!b['k', 'items', 'z'][1, 2, None]21", 75)},
    {R"~({{ 'a\tb\\n\x41\u00e9\U0001F600\'\"\q\101' }}{{ "x" 'y' "z" }}{{ 0x1F }}{{ 1_000 }}{{ 1.5e3 }}{{ 0b101 }}{{ 0o17 }})~",
     std::string("a\tb\\nA\303\251\360\237\230\200'\"\\qAxyz3110001500.0515", 35)},
    {R"~({{ m[0].r }}{% for x in m %}{% if loop.previtem is defined and loop.previtem.r == x.r %}same{% endif %}{% endfor %}{{ m|length - 1 }}{{ (m|length - 1) * 2 }}{{ not(m|length > 5) }}{{ dict(a=1, b=2) }})~",
     std::string("usame24True{'a': 1, 'b': 2}", 27)},
    {R"~({{ d | first }}{{ {'a': 1, 'b': 2, 'a': 3} }}{{ q }}{{ [q, 'a"b', "'\""] }}{{ '\u00a0 x \u3000'|trim }}|)~",
     std::string("k{'a': 3, 'b': 2}it's[\"it's\", 'a\"b', '\\'\"']x|", 45)},
    {R"~(a

{% if t %}

b{% endif %}

{{- 'x' -}}   

  c {%- if t %} d {% endif -%}  
 e
   {% set z = 1 %}   
   {{ z }}
{{ z }}
)~",
     std::string("a\n\n\nbxc d e\n   \n   1\n1", 22)},
};

// What Jinja2 refuses, in the syntax or while rendering.
const char* const kRefused[] = {
    R"~({{ zz.a }})~",
    R"~({{ zz + 1 }})~",
    R"~({{ 1 + 'a' }})~",
    R"~({{ 'a' in 5 }})~",
    R"~({{ zz|tojson }})~",
    R"~({{ none.a.b }})~",
    R"~({{ 1 / 0 }})~",
    R"~({{ f(1) }})~",
    R"~({{ d.k() }})~",
    R"~({% for a, b in [[1]] %}{% endfor %})~",
    R"~({% set d.k = 1 %})~",
    R"~({{ l.append(1) }})~",
    R"~({% if %}x{% endif %})~",
    R"~({% if t %}x)~",
    R"~({{ 1 +)~",
    R"~({% unknown %})~",
    R"~({{ 'a' | nofilter }})~",
    R"~({{ l is notest }})~",
    R"~({% filter upper is string %}x{% endfilter %})~",
    R"~({% set y | upper is string is string %}x{% endset %})~",
    R"~({% set y | upper()() %}x{% endset %})~",
};
// clang-format on

std::string render(const std::string& source, const std::string& request = kRequest) {
  auto parsed = ChatTemplate::parse(source);
  if (!parsed.ok()) return "error: " + parsed.status().message();
  auto result = parsed->render(request);
  return result.ok() ? *result : "error: " + result.status().message();
}

TEST(Jinja, RendersAsJinja2) {
  for (const Case& item : kRendered) EXPECT_EQ(render(item.source), item.expected) << item.source;
}

TEST(Jinja, RefusesWhatJinja2Refuses) {
  for (const char* source : kRefused) {
    const std::string result = render(source);
    EXPECT_TRUE(result.starts_with("error: line 1 ")) << source << " gave " << result;
  }
}

TEST(Jinja, ErrorsNameTheLine) {
  EXPECT_EQ(render("a\n\n{{ zz.a }}"), "error: line 3 of the chat template: 'zz' is undefined");
  EXPECT_EQ(render("a\n{{ raise_exception('no') }}"), "error: no (raised by line 2 of the chat template)");
  EXPECT_TRUE(render("a\n{% nonsense %}").starts_with("error: line 2 ")) << render("a\n{% nonsense %}");
}

std::string repeat(const std::string& text, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += text;
  return out;
}

TEST(Jinja, LimitsStopRunawayTemplates) {
  const std::string hostile[] = {
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
      "{% set n = namespace(x=1) %}{% for a in range(250) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
      "{% set n = namespace(x=1) %}{% for a in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
      "{{ 'a' * 999999999999 }}",
      "{{ [1] * 999999999999 }}",
      "{{ range(999999999) }}",
      "{{ 9223372036854775807 + 1 }}",
      "{% set x = 'a' * 1000000 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
      "{{ " + repeat("(", 100000),
      "{{ " + repeat("[", 5000) + repeat("]", 5000) + " }}",
      "{{ " + repeat("not ", 100000) + "1 }}",
      "{{ " + repeat("-", 100000) + "1 }}",
      "{{ 1" + repeat(" + 1", 100000) + " }}",
      "{{ x" + repeat(".a", 100000) + " }}",
      repeat("{% if 1 %}", 100000),
      "{% if 1 %}" + repeat("{% elif 1 %}", 100000) + "{% endif %}",
  };
  for (const std::string& source : hostile) {
    EXPECT_TRUE(render(source).starts_with("error: line 1 ")) << source.substr(0, 100) << render(source).substr(0, 200);
  }
}

TEST(Jinja, NamespaceCyclesAreHarmless) {
  EXPECT_EQ(render("{% set n = namespace(x=1) %}{% set n.x = [n] %}{{ n.x == n.x }}{{ n.x is sequence }}"), "TrueTrue");
}

}  // namespace
}  // namespace tokenspeed::text

"""200 lines of mixed text, the same at every call: code, many scripts, emoji, and white space anywhere."""

import random

PARTS = [
    "the answer",
    "What is the capital of France?",
    "It lies on the Seine",
    "don't we'LL",
    "NaiveTest helloWORLD",
    "room 7, 12 and 1234567",
    "3.14",
    "1,000,000",
    "0x1F",
    "def f(x):\n    return [x ** 2]",
    "if (a >= b) { c[i++] += 1; }",
    "\"quoted\\n\" 'single' `tick`",
    "<div class='x'>&amp;</div>",
    "a_b.c-d/e:f",
    "https://example.com/a?b=c&d=%20#e",
    "Gro\u00dfer Spa\u00df, \u00e7a va",
    "nai\u0308ve e\u0301\u0323",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002",
    "\u4e2d\u6587\uff0c\u6c34\u548c\u706b",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0661\u0662\u0663",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e44\u0e17\u0e22",
    "\U0001f642\U0001f44d\U0001f3fd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\ufb01 \u2460 \uff46\uff55\uff4c\uff4c \u00bd",
    "...?!",
    "---",
    "$\\frac{1}{3}$",
    "| a | b |",
    "<0x41>",
    "\u201cq\u201d \u2018s\u2019 \u2014 \u2026",
    "\x00\x1b[31m",
    "\U0010ffff",
]
SPACES = [
    "",
    "",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    " " * 9,
    "\n",
    "\n\n",
    "\t",
    "\t\t",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u200b",
]
AROUND = ["", "", "", " ", "  ", "     ", "\n", "\t", " \n"]


def mixed_lines() -> list[str]:
    """The lines; all differ."""
    draw, lines = random.Random(0), dict.fromkeys(["", " ", "  ", "\n", "\t "])
    while len(lines) < 200:
        line = draw.choice(AROUND)
        for _ in range(draw.randrange(1, 6)):
            line += draw.choice(PARTS) + draw.choice(SPACES)
        lines[line + draw.choice(AROUND)] = None
    return list(lines)

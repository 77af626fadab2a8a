"""Lines on which every way to cut words that is known differs from every other."""

LINES = [
    "The DOG'S tail, we'll See it'S ok; cafe\u0301 o'Tis NaiveTest helloWORLD iPhone's",
    "1 12 123 1234 12345 1234567 3.14 1,000,000 \u0661\u0662\u0663 \u00bd\u00b2",
    "def f(x):\n    return {'a': [x ** 2]}  # done\r\n\n\n\t\tif a >= b:\n",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u6c34\u3068\u706b\uff01 \u4e2d\u6587and\u6df7\u5408",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5 \u0e44\u0e17\u0e22 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0645\u0631\u062d\u0628\u0627\u060c \u05e9\u05dc\u05d5\u05dd",
    "\U0001f642 \U0001f469\u200d\U0001f467 $5 + #tag @you `code` ~x~ <a|b> ^ \u20ac9 /path/to\\x",
    "   three spaces      many   \n  \n x ",
    "a/b//c///\n///\n.!? \u2026\u3001\u0964 (x) [y] {z} \u201cq\u201d \u2018s\u2019",
    " x y\u0301z \u01c5a \u10d0\u10d1 \U0001d400b Grossmann \u00c9cole \u0411\u044b\u043b\u041e",
    "IMGIMGABZ <sentinel:12> 'Tis 'dOne x\u00a0y\u2003z\u0085w",
    " " * 9 + "x" + " " * 21,
]

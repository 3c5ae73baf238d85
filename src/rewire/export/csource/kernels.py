"""The C functions that the steps of a network call, as text; ``@`` stands for the prefix of all
names.
"""

from __future__ import annotations

__all__ = ["CELLS", "COPY", "POOLS", "SOFTMAX", "conv", "elementwise", "linear", "pair"]

_LINEAR = """\
static void @{name}({arrays}const float *scale, const float *bias, long rows,
                    long features, long n, const float *x, float *y) {{
  for (long b = 0; b < n; ++b, x += features, y += rows)
    for (long r = 0; r < rows; ++r) {{
      float sum = 0.0f;
{body}
      if (scale) sum *= scale[r];
      y[r] = bias ? sum + bias[r] : sum;
    }}
}}
"""

_CONV = """\
/* shape: samples, groups, channels of a group, height, width, output channels, kernel height and
   width, output height and width, strides, dilations, padding at the top and at the left */
static void @{name}({arrays}const float *scale, const float *bias, const int *shape,
                    const float *x, float *y) {{
  const long channels = shape[2], h = shape[3], w = shape[4], outputs = shape[5];
  const long kh = shape[6], kw = shape[7], oh = shape[8], ow = shape[9];
  for (long b = 0; b < shape[0]; ++b)
    for (long r = 0; r < outputs; ++r, y += oh * ow) {{
      const long group = r / (outputs / shape[1]);
      const float *from = x + (b * shape[1] + group) * channels * h * w;
      for (long p = 0; p < oh * ow; ++p) y[p] = 0.0f;
{body}
      for (long p = 0; p < oh * ow; ++p) {{
        if (scale) y[p] *= scale[r];
        if (bias) y[p] += bias[r];
      }}
    }}
}}
"""

_TAP = """\
        const long col = {col}, kx = col % kw, ky = col / kw % kh;
        const float *plane = from + col / (kw * kh) * h * w;
        for (long oy = 0; oy < oh; ++oy) {{
          const long iy = oy * shape[10] + ky * shape[12] - shape[14];
          if (iy < 0 || iy >= h) continue;
          for (long ox = 0; ox < ow; ++ox) {{
            const long ix = ox * shape[11] + kx * shape[13] - shape[15];
            if (ix >= 0 && ix < w) y[oy * ow + ox] += {value} * plane[iy * w + ix];
          }}
        }}
"""


def _arrays(ptr: str, cols: str, values: str) -> str:
    """The parameters of a matrix; without columns it is dense, without values ternary."""
    found = ""
    if cols:
        found += f"const {ptr} *ptr, const {cols} *cols, "
    return found + (f"const {values} *values, " if values else "")


def _loops(cols: str, values: str, body: str, width: str) -> str:
    """Loops over the connections of row r; ``body`` has {col} and {value}."""
    if not cols:
        inner = body.format(col="k", value=f"(float)values[r * {width} + k]")
        return f"      for (long k = 0; k < {width}; ++k) {{\n{inner}      }}"
    if values:
        inner = body.format(col="cols[k]", value="(float)values[k]")
        return f"      for (long k = ptr[r]; k < (long)ptr[r + 1]; ++k) {{\n{inner}      }}"
    plus, minus = (body.format(col="cols[k]", value=sign) for sign in ("1.0f", "-1.0f"))
    return (
        f"      for (long k = ptr[2 * r]; k < (long)ptr[2 * r + 1]; ++k) {{\n{plus}      }}\n"
        f"      for (long k = ptr[2 * r + 1]; k < (long)ptr[2 * r + 2]; ++k) {{\n{minus}      }}"
    )


def _name(what: str, ptr: str, cols: str, values: str) -> str:
    kind = {"": "ternary", "int8_t": "int8"}.get(values, "float")
    place = f"_{ptr.removesuffix('_t')}_{cols.removesuffix('_t')}" if cols else "_dense"
    return f"{what}_{kind}{place}"


def linear(ptr: str, cols: str, values: str) -> tuple[str, str]:
    """Name and text of the product, for the C types of pointers, columns and values."""
    name = _name("linear", ptr, cols, values)
    body = _loops(cols, values, "        sum += {value} * x[{col}];\n", "features")
    return name, _LINEAR.format(name=name, arrays=_arrays(ptr, cols, values), body=body)


def conv(ptr: str, cols: str, values: str) -> tuple[str, str]:
    """Name and text of the convolution."""
    name = _name("conv", ptr, cols, values)
    body = _loops(cols, values, _TAP, "(channels * kh * kw)")
    return name, _CONV.format(name=name, arrays=_arrays(ptr, cols, values), body=body)


def elementwise(name: str, expression: str) -> str:
    """y = f(v) for each v of x; x and y may be the same."""
    return f"""\
static void @{name}(const float *x, float *y, long n) {{
  for (long i = 0; i < n; ++i) {{
    const float v = x[i];
    y[i] = {expression};
  }}
}}
"""


def pair(name: str, sign: str) -> str:
    """y = a (sign) b, where b repeats after m numbers, each of which is for `inner` in a row."""
    return f"""\
static void @{name}(const float *a, const float *b, float *y, long n, long m, long inner) {{
  for (long i = 0; i < n; ++i) y[i] = a[i] {sign} b[i / inner % m];
}}
"""


#: Numbers at `offset` and strides of x, in order.
COPY = """\
static void @copy(const float *x, long offset, const long *size, const long *stride, int dims,
                  float *y, long n) {
  for (long i = 0; i < n; ++i) {
    long rest = i, at = offset;
    for (int d = dims - 1; d >= 0; --d) {
      at += rest % size[d] * stride[d];
      rest /= size[d];
    }
    y[i] = x[at];
  }
}
"""

SOFTMAX = """\
/* Over `size` numbers that lie `inner` apart. */
static void @softmax(const float *x, float *y, long outer, long size, long inner, int logarithm) {
  for (long o = 0; o < outer; ++o)
    for (long i = 0; i < inner; ++i) {
      const float *from = x + o * size * inner + i;
      float *to = y + o * size * inner + i, most = from[0], sum = 0.0f;
      for (long k = 1; k < size; ++k)
        if (from[k * inner] > most) most = from[k * inner];
      for (long k = 0; k < size; ++k) {
        const float v = from[k * inner] - most;
        sum += expf(v);
        to[k * inner] = v;
      }
      for (long k = 0; k < size; ++k) {
        const float v = to[k * inner];
        to[k * inner] = logarithm ? v - logf(sum) : expf(v) / sum;
      }
    }
}
"""

_POOL = """\
/* shape: planes, height, width, output height and width, kernel, strides, padding, dilations,
   whether padding counts; kernel 0: adaptive windows */
static void @{name}(const int *s, const float *x, float *y) {{
  for (long p = 0; p < s[0]; ++p, x += (long)s[1] * s[2])
    for (long oy = 0; oy < s[3]; ++oy)
      for (long ox = 0; ox < s[4]; ++ox) {{
        long y0 = oy * s[7] - s[9], y1 = y0 + (long)s[5] * s[11];
        long x0 = ox * s[8] - s[10], x1 = x0 + (long)s[6] * s[12];
        if (!s[5]) {{
          y0 = oy * s[1] / s[3], y1 = ((oy + 1) * s[1] + s[3] - 1) / s[3];
          x0 = ox * s[2] / s[4], x1 = ((ox + 1) * s[2] + s[4] - 1) / s[4];
        }}
{start}
        for (long iy = y0; iy < y1; iy += s[11])
          for (long ix = x0; ix < x1; ix += s[12]) {{
            if (iy < 0 || iy >= s[1] || ix < 0 || ix >= s[2]) continue;
            const float v = x[iy * s[2] + ix];
{each}
          }}
        *y++ = {result};
      }}
}}
"""

#: Largest number and mean of windows. A mean counts the padding (not what lies beyond it) if asked.
POOLS: dict[str, str] = {
    "max_pool": _POOL.format(
        name="max_pool",
        start="        float most = -HUGE_VALF;",
        each="            if (v > most || v != v) most = v;",
        result="most",
    ),
    "mean_pool": _POOL.format(
        name="mean_pool",
        start="""\
        float sum = 0.0f;
        long count = 0;
        const long ye = y1 < s[1] + s[9] ? y1 : s[1] + s[9];
        const long xe = x1 < s[2] + s[10] ? x1 : s[2] + s[10];""",
        each="            sum += v, ++count;",
        result="sum / (float)(s[14] ? s[14] : s[13] ? (ye - y0) * (xe - x0) : count)",
    ),
}

#: One step of a recurrent layer of n units: from the products with input and hidden state (g, q) to
#: the next states, in place.
CELLS: dict[str, str] = {
    "rnn_tanh": """\
static void @rnn_tanh(const float *g, const float *q, float *h, float *c, long n) {
  (void)c;
  for (long i = 0; i < n; ++i) h[i] = tanhf(g[i] + q[i]);
}
""",
    "rnn_relu": """\
static void @rnn_relu(const float *g, const float *q, float *h, float *c, long n) {
  (void)c;
  for (long i = 0; i < n; ++i) h[i] = g[i] + q[i] > 0.0f ? g[i] + q[i] : 0.0f;
}
""",
    "gru": """\
static void @gru(const float *g, const float *q, float *h, float *c, long n) {
  (void)c;
  for (long i = 0; i < n; ++i) {
    const float reset = 1.0f / (1.0f + expf(-(g[i] + q[i])));
    const float update = 1.0f / (1.0f + expf(-(g[n + i] + q[n + i])));
    const float fresh = tanhf(g[2 * n + i] + reset * q[2 * n + i]);
    h[i] = fresh + update * (h[i] - fresh);
  }
}
""",
    "lstm": """\
static void @lstm(const float *g, const float *q, float *h, float *c, long n) {
  for (long i = 0; i < n; ++i) {
    const float enter = 1.0f / (1.0f + expf(-(g[i] + q[i])));
    const float forget = 1.0f / (1.0f + expf(-(g[n + i] + q[n + i])));
    const float fresh = tanhf(g[2 * n + i] + q[2 * n + i]);
    const float leave = 1.0f / (1.0f + expf(-(g[3 * n + i] + q[3 * n + i])));
    c[i] = forget * c[i] + enter * fresh;
    h[i] = leave * tanhf(c[i]);
  }
}
""",
}

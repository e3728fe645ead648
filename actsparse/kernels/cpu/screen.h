// The lossless screen: int8 products that say which units cannot be active.
#pragma once
#include "packed.h"

namespace actsparse {
namespace {

void check_channels(int64_t d) {
  if (d > 1 << 16)
    refuse("up must have at most 65536 columns, or sums of products of codes do not fit 32 bits; "
           "it has " + std::to_string(d));
}

// int8 copy of up [units, D]: codes, their shift, and scale, error, norm as rows of `bounds`.
std::tuple<Tensor, Tensor, Tensor> quantise(const Tensor& up) {
  const auto [units, d] = sizes_of("up", up);
  check_channels(d);
  const Rows rows("up", up, units, d);
  const int64_t padded = ceil_div(units, kWord) * kWord, channels = ceil_div(d, kPanel) * kPanel;
  Tensor codes = empty<int8_t>(padded, channels), shift = empty<int32_t>(padded);
  Tensor bounds = empty<float>(3, padded);
  int8_t* out = data<int8_t>(codes);
  // as many roundings as any order of float32 summation makes, and our own in the bound
  const double u = (2 * d + 64) * 0x1p-24, gamma = u / (1 - u);
  split(padded, [&](int64_t a, int64_t b) {
    const auto row = scratch<uint8_t>(channels);
    for (int64_t h = a; h < b; h++) {
      float stats[3] = {};
      if (h < units)
        kernels()->quantise(rows.data + h * d, d, 1, 0, row.get(), channels, stats);
      else
        std::fill_n(row.get(), channels, uint8_t(0));
      int32_t sum = 0;
      int8_t* to = out + h / kGroup * channels * kGroup + h % kGroup * kPanel;
      for (int64_t c = 0; c < channels; c += kPanel)
        for (int64_t i = 0; i < kPanel; i++) {
          const int8_t code = static_cast<int8_t>(row[c + i]);
          to[c * kGroup + i] = code;
          sum += code;
        }
      const double norm = (double)stats[1] + stats[2];  // ‖û‖ at most
      data<int32_t>(shift)[h] = -128 * sum;
      data<float>(bounds)[h] = stats[0];
      data<float>(bounds)[padded + h] = (float)((stats[2] + gamma * norm) * (1 + 1e-6));
      data<float>(bounds)[2 * padded + h] = (float)(norm * (1 + gamma) * (1 + 1e-6));
    }
  }, kGroup);
  return {codes, shift, bounds};
}

struct Screen {
  const Tensor &codes, &shift, &bounds;
};

// Mask of the units that may lie above floor ≥ 0: the bound proves the others below.
Scratch<uint64_t> screened_mask(const float* x, const float* bias, Shape s, int64_t d,
                                const Screen& u, float floor) {
  const int64_t padded = u.codes.size(0), channels = u.codes.size(1), groups = padded / kGroup;
  const float* bound = data<float>(u.bounds);
  const double gamma = (2 * d + 64) * 0x1p-24, lost = (d + 16) * 2.4e-38;
  const auto shifted = scratch<float>(padded);
  for (int64_t h = 0; h < padded; h++) {
    const double b = bias && h < s.units ? bias[h] : 0.;
    const double roundings = (b < 0 ? -b : b) + floor;  // of b, and of the difference here
    shifted[h] = (float)(b - floor + roundings * gamma * 1.01 + lost);
  }
  const auto stats = scratch<float>(3 * s.tokens);
  const auto codes = scratch<uint8_t>(2 * s.tokens * channels);
  int planes = few(s.tokens) ? 2 : 1;  // with few tokens a second plane costs next to nothing
  for (;; planes = 2) {
    split(s.tokens, [&](int64_t a, int64_t b) {
      for (int64_t t = a; t < b; t++) {
        float row[3];
        kernels()->quantise(x + t * d, d, planes, 128, &codes[t * planes * channels], channels, row);
        for (int i = 0; i < 3; i++) stats[i * s.tokens + t] = row[i];
      }
    }, kSmall);
    // 8 bits err by 0.8 % of a Gaussian row's norm: at twice that, outlier channels set the step
    double norm = 0, error = 0;
    for (int64_t t = 0; t < s.tokens; t++) {
      if (!(stats[s.tokens + t] < 1e18f)) continue;
      norm += stats[s.tokens + t], error += stats[2 * s.tokens + t];
    }
    if (planes == 2 || error <= 0.016 * norm) break;
  }
  auto mask = scratch<uint64_t>(s.tokens * s.words());
  const Codes to{data<int8_t>(u.codes), data<int32_t>(u.shift), bound,  bound + padded,
                 bound + 2 * padded,    shifted.get(),          groups, channels};
  const Tokens from{codes.get(), stats.get(), &stats[s.tokens], &stats[2 * s.tokens], planes};
  if (few(s.tokens))
    split(groups, [&](int64_t a, int64_t b) {
      kernels()->screen(to, from, {0, s.tokens}, {a, b}, s.words(), mask.get());
    }, kWord / kGroup);
  else
    split(s.tokens, [&](int64_t a, int64_t b) {
      kernels()->screen(to, from, {a, b}, {0, groups}, s.words(), mask.get());
    });
  if (const int64_t rest = s.units % kWord)  // of a token with NaN or inf even padding passes
    for (int64_t t = 1; t <= s.tokens; t++)
      mask[t * s.words() - 1] &= (uint64_t(1) << rest) - 1;
  return mask;
}

// Pointer and index of the units of up [s.units, D] that may be active for x [s.tokens, D].
std::tuple<Tensor, Tensor> candidates_of(const Tensor& x, int64_t d, const Maybe& bias,
                                         const Screen& screen, Shape s, float floor) {
  const int64_t padded = ceil_div(s.units, kWord) * kWord;
  check_channels(d);
  if (!x.is_contiguous()) refuse("x", Type<float>::name, shown(x.sizes()), x);
  require("bias", bias, s.units);
  require<int8_t>("codes", screen.codes, {padded, ceil_div(d, kPanel) * kPanel});
  require<int32_t>("shift", screen.shift, {padded});
  require("bounds", screen.bounds, {3, padded});
  const auto mask = screened_mask(data<float>(x), data<float>(bias), s, d, screen, floor);
  Tensor pointer = empty<int64_t>(s.segments() + 1), index;
  bits_of(mask.get(), s, data<int64_t>(pointer), index);
  return {pointer, index};
}

Packed pack_screened(const Tensor& x, const Tensor& up, const Maybe& bias, const Screen& screen,
                     Shape s, Phi phi) {
  const int64_t d = up.size(1);
  const float floor = phi.floor;
  const Rows rows("up", up, s.units, d);
  const auto [start, candidates] = candidates_of(x, d, bias, screen, s, floor);
  const float* b = data<float>(bias);
  const int64_t* candidate = data<int64_t>(start);
  const int32_t* unit = data<int32_t>(candidates);
  const int64_t n = candidate[s.segments()];
  const auto z = scratch<float>(n);
  sample_into({candidate, unit, s.blocks()}, data<float>(x), rows.data, s.tokens, d,
              z.get());
  Packed p{empty<int64_t>(s.segments() + 1), Tensor(), Tensor(), Tensor()};
  int64_t* pointer = data<int64_t>(p.pointer);
  split(s.segments(), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      int64_t active = 0;
      for (int64_t k = candidate[i]; k < candidate[i + 1]; k++) {
        if (b) z[k] += b[unit[k]];
        active += !(z[k] <= floor);
      }
      pointer[i + 1] = active;
    }
  }, 8 * kSmall);
  running_total(pointer, s.segments());
  const int64_t active = pointer[s.segments()];
  p.index = empty<int32_t>(active), p.value = empty<float>(active);
  int32_t* index = data<int32_t>(p.index);
  float* value = data<float>(p.value);
  split(s.segments(), [&](int64_t from, int64_t to) {
    int64_t o = pointer[from];
    for (int64_t k = candidate[from]; k < candidate[to]; k++)
      if (!(z[k] <= floor)) index[o] = unit[k], value[o++] = z[k];
  }, 8 * kSmall);
  p.slope = activate(p.value, active, phi.act);
  return p;
}

}  // namespace
}  // namespace actsparse

// The lossless screen: int8 products that say which units cannot be active. A unit is left out if
//     ẑ + b + off + ‖x − x̂‖ ‖û‖ (1 + γ) + γ (|b| + t) + lost < t,
//     off = min(‖x‖ e, ‖x′‖ e + ‖x − x′‖₁ s), e = ‖u − û‖ + γ‖û‖, s = max |u − û| + γ max |û|,
// by Cauchy–Schwarz, or for large entries of x, which x′ is without, by Hölder: a channel in which x
// is large does not multiply what all channels of u are off by. û and x̂ are the int8 copies, ẑ =
// x̂ · û, t is φ's threshold, γ bounds float32's rounding in any order of summation, and `lost` is
// what underflow takes.
#pragma once
#include "multiply.h"

namespace actsparse {
namespace {

void check_channels(int64_t d) {
  if (d > 1 << 16)
    refuse("up must have at most 65536 columns, or sums of products of codes do not fit 32 bits; "
           "it has " + std::to_string(d));
}

// What products of bf16 pairs may lose of the norm of d entries: they flush denormals to zero.
template <class E>
float flushed(int64_t d) {
  return sizeof(E) == 2 ? (float)(std::sqrt((double)d) * 0x1p-125) : 0.f;
}

// int8 copy of up [units, D]: codes, their shift, and scale, error, norm, step as rows of `bounds`.
std::tuple<Tensor, Tensor, Tensor> quantise(const Tensor& up) {
  const auto [units, d] = sizes_of("up", up);
  check_channels(d);
  const int64_t padded = ceil_div(units, kWord) * kWord, channels = ceil_div(d, kFour) * kFour;
  Tensor codes = empty<int8_t>({padded, channels}), shift = empty<int32_t>({padded});
  Tensor bounds = empty<float>({4, padded});
  int8_t* out = data<int8_t>(codes);
  // as many roundings as any order of float32 summation makes, and our own in the bound
  const double u = (2 * d + 64) * 0x1p-24, gamma = u / (1 - u);
  by_dtype("up", up, [&, units = units, d = d](auto e) {
    using E = decltype(e);
    const bool turned = by_columns<E>("up", up, units, d);
    split(padded, [&](int64_t a, int64_t b) {
      const auto rows = scratch<uint8_t>(kGroup * channels);
      const auto sixteen = scratch<E>(kGroup * d);
      const auto values = scratch<float>(d);
      for (int64_t h = a; h < b; h++) {
        const int64_t g = h % kGroup;
        uint8_t* row = &rows[g * channels];
        float stats[5] = {};
        if (turned && g == 0 && h < units)
          by<E>().transpose(data<E>(up) + h, units, d, std::min(kGroup, units - h), sixteen.get(), d);
        if (h < units) {
          by<E>().widen(turned ? &sixteen[g * d] : data<E>(up) + h * d, d, values.get());
          kernels()->quantise(values.get(), d, 1, 0, row, channels, stats);
        } else
          std::fill_n(row, channels, uint8_t(0));
        const double norm = (double)stats[1] + stats[2];  // ‖û‖ at most
        // codes are within half a step, and a rounding of `quantise`; without codes error is ‖u‖
        const double most = stats[0] > 0 ? stats[0] * (0.5 + 127 * (gamma + 0x1p-22))
                                         : stats[2] * (1 + gamma);
        stats[2] += flushed<E>(d);
        int32_t sum = 0;
        for (int64_t c = 0; c < channels; c++) sum += static_cast<int8_t>(row[c]);
        data<int32_t>(shift)[h] = -128 * sum;
        data<float>(bounds)[h] = stats[0];
        data<float>(bounds)[padded + h] = (float)((stats[2] + gamma * norm) * (1 + 1e-6));
        data<float>(bounds)[2 * padded + h] = (float)(norm * (1 + gamma) * (1 + 1e-6));
        data<float>(bounds)[3 * padded + h] = (float)((most + flushed<E>(1)) * (1 + 1e-6));
        if (g == kGroup - 1)  // four codes to a word: turn the sixteen rows of words
          by<float>().transpose(reinterpret_cast<const float*>(rows.get()), channels / kFour, kGroup,
                                channels / kFour,
                                reinterpret_cast<float*>(out + (h - g) * channels), kGroup);
      }
    }, kGroup);
  });
  return {codes, shift, bounds};
}

struct Screen {
  const Tensor &codes, &shift, &bounds;
};

// Mask of the units that may lie above floor ≥ 0: the bound proves the others below.
template <class E>
Scratch<uint64_t> screened_mask(const E* x, const float* bias, Shape s, int64_t d, const Screen& u,
                                float floor) {
  const int64_t padded = u.codes.size(0), channels = u.codes.size(1), groups = padded / kGroup;
  const float* bound = data<float>(u.bounds);
  const double gamma = (2 * d + 64) * 0x1p-24, lost = (d + 16) * 2.4e-38;
  if (sizeof(E) == 2) floor *= 1 - 0x1p-8f;  // what rounding to bf16 may lift above it
  const auto shifted = scratch<float>(padded);
  for (int64_t h = 0; h < padded; h++) {
    const double b = bias && h < s.units ? bias[h] : 0.;
    const double roundings = (b < 0 ? -b : b) + floor;  // of b, and of the difference here
    shifted[h] = (float)(b - floor + roundings * gamma * 1.01 + lost);
  }
  const auto stats = scratch<float>(5 * s.tokens);
  const auto codes = scratch<uint8_t>(2 * s.tokens * channels);
  int planes = few(s.tokens) ? 2 : 1;  // with few tokens a second plane costs next to nothing
  for (;; planes = 2) {
    split(s.tokens, [&](int64_t a, int64_t b) {
      const auto values = scratch<float>(d);
      for (int64_t t = a; t < b; t++) {
        float row[5];
        by<E>().widen(x + t * d, d, values.get());
        kernels()->quantise(values.get(), d, planes, 128, &codes[t * planes * channels], channels,
                            row);
        row[2] += flushed<E>(d);
        for (int i = 0; i < 5; i++) stats[i * s.tokens + t] = row[i];
      }
    }, kSmall);
    // 8 bits err by 0.8 % of a Gaussian row: at twice that of the rest, large entries set the step
    double rest = 0, error = 0;
    for (int64_t t = 0; t < s.tokens; t++) {
      if (!(stats[s.tokens + t] < 1e18f)) continue;
      rest += stats[3 * s.tokens + t], error += stats[2 * s.tokens + t];
    }
    if (planes == 2 || error <= 0.016 * rest) break;
  }
  auto mask = scratch<uint64_t>(s.tokens * s.words());
  const Codes to{data<int8_t>(u.codes), data<int32_t>(u.shift), bound, bound + padded,
                 bound + 3 * padded, bound + 2 * padded, shifted.get(), groups, channels};
  const auto of = [&](int i) { return &stats[i * s.tokens]; };
  const Tokens from{codes.get(), of(0), of(1), of(3), of(4), of(2), planes};
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
template <class E>
std::tuple<Tensor, Tensor> candidates_of(const Tensor& x, int64_t d, const float* bias,
                                         const Screen& screen, Shape s, float floor) {
  const int64_t padded = ceil_div(s.units, kWord) * kWord;
  check_channels(d);
  require<int8_t>("codes", screen.codes, {padded, ceil_div(d, kFour) * kFour});
  require<int32_t>("shift", screen.shift, {padded});
  require<float>("bounds", screen.bounds, {4, padded});
  const auto mask = screened_mask(data<E>(x), bias, s, d, screen, floor);
  Tensor pointer = empty<int64_t>({s.segments() + 1}), index;
  bits_of(mask.get(), s, data<int64_t>(pointer), index);
  return {pointer, index};
}

// x is contiguous [..., d], of s.tokens tokens.
template <class E>
Packed pack_screened(const Tensor& x, int64_t d, const Tensor& up, const Maybe& bias,
                     const Screen& screen, Shape s, Phi phi) {
  require<E>("bias", bias, s.units);
  const auto plus = floats<E>(bias, s.units, s.units);
  const auto [start, candidates] = candidates_of<E>(x, d, get(plus), screen, s, phi.floor);
  const Entries a{data<int64_t>(start), data<int32_t>(candidates), s.blocks()};
  const Sums<E> sums(a, data<E>(x), s.tokens, "up", up, s.units, d, 0.5);
  // each token's entries where its candidates were, with room for what `keep` writes too much
  const auto at = [&](int64_t t) { return a.pointer[t * a.blocks] + 16 * t; };
  const int64_t room = a.pointer[s.segments()] + 16 * s.tokens;
  const auto units = scratch<int32_t>(room);
  const auto values = scratch<E>(room);
  Packed p{empty<int64_t>({s.segments() + 1}), Tensor(), Tensor(), Tensor()};
  int64_t* pointer = data<int64_t>(p.pointer);
  split(s.tokens, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
    {
      int64_t o = at(t), *kept = pointer + t * a.blocks + 1;
      std::fill_n(kept, a.blocks, 0);
      sums.each(t, [&](int64_t k, int64_t n, const float* z) {
        const int64_t found = by<E>().keep(z, a.index + k, n, get(plus), phi.floor, &units[o],
                                           &values[o]);
        for (int64_t i = o; i < o + found; i++) kept[units[i] / kBlock]++;
        o += found;
      });
    }
  }, kSmall);
  running_total(pointer, s.segments());
  const int64_t active = pointer[s.segments()];
  p.index = empty<int32_t>({active}), p.value = empty<E>({active});
  split(s.tokens, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const int64_t k = pointer[t * a.blocks], n = pointer[(t + 1) * a.blocks] - k;
      std::copy_n(&units[at(t)], n, data<int32_t>(p.index) + k);
      std::copy_n(&values[at(t)], n, data<E>(p.value) + k);
    }
  }, kSmall);
  p.slope = activate(data<E>(p.value), active, phi.act);
  return p;
}

}  // namespace
}  // namespace actsparse

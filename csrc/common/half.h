// 16-bit floats to float and back, rounded to nearest, ties to even. Without branches, so that loops become vectors.
//
// In an unnamed namespace, as files with AVX in them include this (isa.h).
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace mmebm {
namespace {

inline float from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float y) {
  const uint32_t bits = float_bits(y);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_fp16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const uint32_t exponent = h & 0x7c00u;
  // subnormal: put the bits behind a one and take the one off
  const uint32_t tiny = float_bits(bits_float(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t usual = magnitude + ((exponent == 0x7c00u ? 224u : 112u) << 23);
  return bits_float(sign | (exponent == 0 ? tiny : usual));
}

inline uint16_t to_fp16(float y) {
  const uint32_t bits = float_bits(y), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  // a subnormal's unit is the last bit of a number in [1/2, 1): the addition rounds
  const uint32_t tiny = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
  const uint32_t usual = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const uint32_t huge = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (size >= 0x47800000u ? huge : size < 0x38800000u ? tiny : usual));
}

}  // namespace
}  // namespace mmebm

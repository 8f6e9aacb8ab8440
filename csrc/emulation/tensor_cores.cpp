// ldmatrix, mma and the formats they take, by the fragment layouts of the PTX ISA (common.cuh repeats them).
#include "machine.h"
#include "memory.h"

namespace ldmkit::emulation {
namespace {

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct Rows {
  const unsigned char* row;
  uint32_t* r;
  int matrices;
};

template <bool transposed>
void load_matrices(void* const (&offers)[32], uint32_t) {
  const int matrices = static_cast<Rows*>(offers[0])->matrices;
  for (int i = 0; i < matrices; ++i) {
    uint16_t tile[8][8];
    for (int j = 0; j < 8; ++j) std::memcpy(tile[j], static_cast<Rows*>(offers[8 * i + j])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint32_t low = transposed ? tile[column][row] : tile[row][column];
      const uint32_t high = transposed ? tile[column + 1][row] : tile[row][column + 1];
      static_cast<Rows*>(offers[lane])->r[i] = low | high << 16;
    }
  }
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// d += a b, products exact and sums in fp32, in the order of k.
template <int K>
void multiply(void* const (&offers)[32], const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  const auto exchange = [&](auto&& move) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) move(static_cast<Fragments*>(offers[lane])->d[i], d[g + 8 * (i / 2)][2 * t + i % 2]);
    }
  };
  exchange([](float& mine, float& element) { element = mine; });
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  exchange([](float& mine, float& element) { mine = element; });
}

template <float (*widen)(uint16_t)>
void multiply_16_bit(void* const (&offers)[32], uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(offers[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t pair) { return widen(static_cast<uint16_t>(pair >> 16 * half)); };
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = element(mine.a[i]);
      for (int i = 0; i < 2; ++i) b[2 * t + half + 8 * i][g] = element(mine.b[i]);
    }
  }
  multiply(offers, a, b);
}

void multiply_tf32(void* const (&offers)[32], uint32_t) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(offers[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = float_of(mine.a[i] & 0xffffe000u);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(mine.b[i] & 0xffffe000u);
  }
  multiply(offers, a, b);
}

}  // namespace

void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed) {
  const Place place = LDMKIT_CALLER;
  if (lane_id() < 8 * matrices) {
    check_shared(row, 16, "ldmatrix", place);
    check_aligned(row, 16, "ldmatrix", place);
    check_access(row, 16, false, place);
  }
  Rows offer = {static_cast<const unsigned char*>(row), r, matrices};
  meet_warp(~0u, "ldmatrix", &offer, transposed ? load_matrices<true> : load_matrices<false>, place);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half) {
  Fragments offer = {d, a, b};
  const Complete complete = is_half ? multiply_16_bit<half_to_float> : multiply_16_bit<bfloat16_to_float>;
  meet_warp(~0u, "mma.m16n8k16", &offer, complete, LDMKIT_CALLER);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments offer = {d, a, b};
  meet_warp(~0u, "mma.m16n8k8.tf32", &offer, multiply_tf32, LDMKIT_CALLER);
}

uint32_t to_tf32(float x) { return x == x ? (bits_of(x) + 0x1000u) & 0xffffe000u : 0x7fffffffu; }

float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return value == value ? static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16) : uint16_t(0x7fff);
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = float_of(magnitude << 13) * 0x1p+112f;  // subnormals too: the product is exact
  return float_of(sign | bits_of(scaled));
}

uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (value != value) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

}  // namespace ldmkit::emulation

// One 32 x 32 tile of codes against ROWS query rows at a time, in integers.

#include "tiles.h"

namespace innerq {
namespace {

// sums[r][half] += codes . fours[r] over the 32 inner numbers; fours is [ROWS][8] groups of four signed bytes.
template <int BITS, int ROWS>
INNERQ_INLINE void dot_tile(const uint8_t* tile, int sub, const int32_t* fours, DotProduct<BITS> (*sums)[2]) {
    const uint8_t* p = tile + sub * VB;
    if (BITS == 8 || BITS == 4) {
        for (int quad = 0; quad < 8; quad++) {
            for (int half = 0; half < 2; half++) {
                Words codes = load<Words>(p + 64 * (BITS == 8 ? 2 * quad + half : quad));
                if (BITS == 4) codes = half ? byte_field<4, 15>(codes) : byte_field<0, 15>(codes);
                for (int r = 0; r < ROWS; r++) sums[r][half].add(codes, fours[r * 8 + quad]);
            }
        }
        return;
    }
    // A byte holds quads `row` and `row + 4`; with 3 bits both come out of one combined register.
    for (int row = 0; row < 4; row++) {
        Words low = load<Words>(p + 64 * row);
        Words high = BITS == 3 ? load<Words>(p + 256 + 64 * (row % 2)) : Words{};
        for (int half = 0; half < 2; half++) {
            Words first, second;
            if (BITS == 2) {
                first = half ? byte_field<2, 3>(low) : byte_field<0, 3>(low);
                second = half ? byte_field<6, 3>(low) : byte_field<4, 3>(low);
            } else {
                int shift = row / 2 * 2 + half - 2;
                Words moved = shift < 0 ? high << -shift : high >> (shift > 0 ? shift : 0);
                Words both = ((half ? low >> 2 : low) & 0x33333333u) | (moved & ~0x33333333u);
                first = byte_field<0, 7>(both);
                second = byte_field<4, 7>(both);
            }
            for (int r = 0; r < ROWS; r++) {
                sums[r][half].add(first, fours[r * 8 + row]);
                sums[r][half].add(second, fours[r * 8 + row + 4]);
            }
        }
    }
}

// One tile's share: some lines of codes, and the line of scales (and zeros) that goes with them.
template <int BITS, bool ZEROS>
INNERQ_INLINE void prefetch_tile(const BlockPointers& block, int tile, const uint8_t*& ahead) {
    for (int i = 0; i < dot_lines(BITS); i++) __builtin_prefetch(ahead + 64 * i);
    ahead += 64 * dot_lines(BITS);
    constexpr int tiles_ahead = PREFETCH_AHEAD / (128 * BITS);
    __builtin_prefetch(block.scales + (tile + tiles_ahead) * BLOCK);
    if (ZEROS) __builtin_prefetch(block.zeros + (tile + tiles_ahead) * BLOCK);
}

// What a tile's finished sums become: s * (scale * sums - centered) [+ z * total]; a hybrid's sign bit drops centered.
struct Parameters {
    Floats s, z;
    Ints off_center;
};

template <bool ZEROS>
INNERQ_INLINE Parameters load_parameters(const TensorSpec& spec, const BlockPointers& block, int64_t index) {
    Parameters p = {load_floats(block.scales + index), Floats{}, Ints{}};
    if (ZEROS) {
        p.z = load_floats(block.zeros + index);
        p.off_center = spec.mode == HYBRID ? (Ints)p.s < 0 : Ints{} - 1;
        p.s = abs(p.s);
    }
    return p;
}

template <bool ZEROS> INNERQ_INLINE Floats finish(const Parameters& p, Ints sums, const Factors& f, int index) {
    Floats centered = broadcast(f.centered[index]);
    if (!ZEROS) return p.s * (to_floats(sums) * f.scale[index] - centered);
    centered = p.off_center ? Floats{} : centered;
    return p.s * (to_floats(sums) * f.scale[index] - centered) + p.z * f.total[index];
}

template <int BITS, int ROWS, bool ZEROS>
void score_blocks(const TensorSpec& spec, BlockPointers block, int tiles, int blocks, const int32_t* fours,
                  const Factors& factors, const uint8_t* ahead, float* scores) {
    for (int i = 0; i < blocks; i++) {
        for (int sub = 0; sub < SUBS; sub++) {
            Floats total[ROWS][2];
            for (int r = 0; r < ROWS; r++) total[r][0] = total[r][1] = broadcast(factors.start[r]);
            for (int tile = 0; tile < tiles; tile++) {
                DotProduct<BITS> sums[ROWS][2];
                if (sub == 0) prefetch_tile<BITS, ZEROS>(block, tile, ahead);
                dot_tile<BITS, ROWS>(block.codes + tile * 128 * BITS, sub, fours + tile * ROWS * 8, sums);
                for (int half = 0; half < 2; half++) {
                    Parameters p = load_parameters<ZEROS>(spec, block, tile * BLOCK + half * 16 + sub * LANES);
                    for (int r = 0; r < ROWS; r++) {
                        total[r][half] += finish<ZEROS>(p, sums[r][half].sums(), factors, tile * ROWS + r);
                    }
                }
            }
            for (int r = 0; r < ROWS; r++) {
                for (int half = 0; half < 2; half++) {
                    store(scores + r * CHUNK + i * BLOCK + half * 16 + sub * LANES, total[r][half]);
                }
            }
        }
        block.codes += tiles * 128 * BITS;
        block.scales += tiles * BLOCK;
        if (ZEROS) block.zeros += tiles * BLOCK;
    }
}

template <int BITS, int ROWS, bool ZEROS>
void add_value_blocks(const TensorSpec& spec, BlockPointers block, int tiles, int blocks, const int32_t* fours,
                      const Factors& factors, const uint8_t* ahead, float* out) {
    for (int i = 0; i < blocks; i++) {
        for (int tile = 0; tile < tiles; tile++) {
            for (int sub = 0; sub < SUBS; sub++) {
                DotProduct<BITS> sums[ROWS][2];
                if (sub == 0) prefetch_tile<BITS, ZEROS>(block, tile, ahead);
                dot_tile<BITS, ROWS>(block.codes + tile * 128 * BITS, sub, fours + i * ROWS * 8, sums);
                for (int half = 0; half < 2; half++) {
                    int channel = tile * BLOCK + half * 16 + sub * LANES;
                    Parameters p = load_parameters<ZEROS>(spec, block, channel);
                    for (int r = 0; r < ROWS; r++) {
                        float* to = out + r * tiles * BLOCK + channel;
                        store(to, load_floats(to) + finish<ZEROS>(p, sums[r][half].sums(), factors, i * ROWS + r));
                    }
                }
            }
        }
        block.codes += tiles * 128 * BITS;
        block.scales += tiles * BLOCK;
        if (ZEROS) block.zeros += tiles * BLOCK;
    }
}

template <int BITS, int ROWS> BlockLoop pick(bool values, bool zeros) {
    if (values) return zeros ? add_value_blocks<BITS, ROWS, true> : add_value_blocks<BITS, ROWS, false>;
    return zeros ? score_blocks<BITS, ROWS, true> : score_blocks<BITS, ROWS, false>;
}

template <int ROWS> BlockLoop pick(const TensorSpec& spec, bool values) {
    bool zeros = spec.mode != SYMMETRIC;
    return spec.bits == 2   ? pick<2, ROWS>(values, zeros)
           : spec.bits == 3 ? pick<3, ROWS>(values, zeros)
           : spec.bits == 4 ? pick<4, ROWS>(values, zeros)
                            : pick<8, ROWS>(values, zeros);
}

}  // namespace

BlockLoop block_loop_for(int rows, const TensorSpec& spec, bool values) {
    return rows == 1   ? pick<1>(spec, values)
           : rows == 2 ? pick<2>(spec, values)
           : rows == 4 ? pick<4>(spec, values)
                       : pick<8>(spec, values);
}

}  // namespace innerq

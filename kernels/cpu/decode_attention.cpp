// decode_attention: softmax(sm_scale * q K^T + mask) V of the last M tokens over windows and packed blocks.
//
// The R = M * Hq / H query rows of a key-value head share every unpacking. A head's blocks are cut into splits, each
// an online softmax over chunks of CHUNK tokens; the windows are one more split, in float. Packed blocks: queries
// (times key norm and sm_scale) are rounded to signed bytes per 32 channels, probabilities to 7 bits per 32 tokens; a
// scale is applied once to a finished group of 32. `exact` dequantizes each tile and stays in float.
// How work is split depends on shapes and counts alone, so a result does not depend on the number of threads.

#include <memory>
#include <vector>

#include "query_rows.h"

namespace innerq {

namespace {

constexpr int64_t ENOUGH_ITEMS = 64;  // to keep many cores busy; more of them only cost their beginnings
constexpr int MIN_SPLIT_BLOCKS = 32;

template <class T> struct Attention {
    const Geometry& g;
    const Buffers& buffers;
    const AttentionRequest& request;
    int64_t rows;                           // R, per key-value head
    std::vector<int64_t> first_item;        // of each batch row, and the end
    std::unique_ptr<std::atomic<int64_t>[]> unfinished;  // splits of each head
    float* partials;

    int64_t packed_blocks(const Row& row) const { return std::clamp<int64_t>(row.quantized / BLOCK, 0, g.blocks); }

    int64_t split_blocks(int64_t blocks) const {
        int64_t splits = (ENOUGH_ITEMS + g.batch * g.heads - 1) / (g.batch * g.heads);
        return std::max<int64_t>((blocks + splits - 1) / splits, MIN_SPLIT_BLOCKS);
    }

    int64_t items_of_head(const Row& row) const {
        int64_t blocks = packed_blocks(row), each = split_blocks(blocks);
        return 1 + (blocks + each - 1) / each;
    }

    int64_t partial_size() const { return (rows * (g.head_dim + 2) + LANES - 1) / LANES * LANES; }

    Partial partial(int64_t item) const {
        float* p = partials + item * partial_size();
        return {p + rows * g.head_dim, p + rows * (g.head_dim + 1), p};
    }

    template <int ROWS> void run_rows(const Head& head, int64_t split, const Partial& p, int64_t& first) const {
        int64_t blocks = packed_blocks(head.row), each = split_blocks(blocks), block = (split - 1) * each;
        for (; rows - first >= ROWS; first += ROWS) {
            Batch<ROWS> batch(head, first, p);
            if (split == 0) batch.template run_windows<T>(blocks * BLOCK);
            if (split > 0) batch.template run_packed<T>(block, std::min(each, blocks - block));
        }
    }

    void run_item(int64_t item) const {
        int64_t b = std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
        Row row(buffers, b);
        int64_t each = items_of_head(row), local = item - first_item[b], h = local / each, first = 0;
        Head head{g, buffers, request, row, b, h};
        Partial p = partial(item);
        run_rows<8>(head, local % each, p, first);
        run_rows<4>(head, local % each, p, first);
        run_rows<2>(head, local % each, p, first);
        run_rows<1>(head, local % each, p, first);
        if (unfinished[head.index()].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            combine(head, item - local % each, each);
        }
    }

    // out = sum of the splits' sums, each brought to the largest score of all; 0 where nothing may be attended.
    void combine(const Head& head, int64_t first, int64_t count) const {
        T* out = static_cast<T*>(request.out) + head.index() * rows * g.head_dim;
        for (int64_t r = 0; r < rows; r++) {
            float largest = LOWEST, total = 0;
            for (int64_t i = 0; i < count; i++) largest = std::max(largest, partial(first + i).largest[r]);
            alignas(VB) float sum[MAX_HEAD_DIM] = {};
            for (int64_t i = 0; i < count; i++) {
                Partial p = partial(first + i);
                float factor = std::exp2(p.largest[r] - largest);
                total += factor * p.sum[r];
                for (int64_t d = 0; d < g.head_dim; d += LANES) {
                    store(sum + d, load_floats(sum + d) + load_floats(p.out + r * g.head_dim + d) * factor);
                }
            }
            for (int64_t d = 0; d < g.head_dim; d += LANES) {
                Floats value = total == 0 ? Floats{} : load_floats(sum + d) / total;  // NaN if the total is
                store_floats(out + r * g.head_dim + d, value);
            }
        }
    }

    void run() {
        first_item.push_back(0);
        unfinished = std::make_unique<std::atomic<int64_t>[]>(g.batch * g.heads);
        for (int64_t b = 0; b < g.batch; b++) {
            int64_t each = items_of_head(Row(buffers, b));
            for (int64_t h = 0; h < g.heads; h++) unfinished[b * g.heads + h] = each;
            first_item.push_back(first_item.back() + each * g.heads);
        }
        static thread_local std::vector<float> workspace;
        size_t needed = first_item.back() * partial_size() + LANES;
        if (workspace.size() < needed) workspace.resize(needed);
        void* aligned = workspace.data();
        size_t space = needed * sizeof(float);
        partials = static_cast<float*>(std::align(VB, (needed - LANES) * sizeof(float), aligned, space));
        parallel_for(request.threads, first_item.back(), [this](int64_t item) { run_item(item); });
    }
};

template <class T> void attend(const Geometry& g, const AttentionRequest& request) {
    int64_t rows = request.q_len * (request.q_heads / g.heads);
    Attention<T>{g, request.buffers, request, rows, {}, nullptr, nullptr}.run();
}

}  // namespace

void decode_attention(const Geometry& g, const AttentionRequest& request) {
    if (g.dtype == FLOAT32) attend<float>(g, request);
    if (g.dtype == BFLOAT16) attend<BFloat>(g, request);
    if (g.dtype == FLOAT16) attend<Half>(g, request);
}

}  // namespace innerq

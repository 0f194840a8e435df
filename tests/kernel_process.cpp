// One request from standard input to standard output: how a test drives kernels that were built for another machine.
//
// In: op, Geometry, the buffers of a layer, the op's numbers, the op's tensors (all contiguous). Out: what it changed.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace innerq;
using Bytes = std::vector<char>;

static void must(bool done) {
    if (!done) std::abort();
}
template <class T> static T number() {
    T value;
    must(std::fread(&value, sizeof value, 1, stdin) == 1);
    return value;
}
static Bytes tensor() {
    Bytes bytes(number<int64_t>());
    must(std::fread(bytes.data(), 1, bytes.size(), stdin) == bytes.size());
    return bytes;
}
static void write(const Bytes& bytes) { must(std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size()); }

int main() {
    enum Op : int64_t { APPEND, DEQUANTIZE, ATTEND } op = number<Op>();
    Geometry g = number<Geometry>();
    std::vector<Bytes> layer(sizeof(Buffers) / sizeof(void*));
    void* addresses[sizeof(Buffers) / sizeof(void*)];
    for (size_t i = 0; i < layer.size(); i++) layer[i] = tensor(), addresses[i] = layer[i].data();
    Buffers buffers;
    std::memcpy(&buffers, addresses, sizeof buffers);
    int64_t capacity = number<int64_t>(), size = g.dtype == FLOAT32 ? 4 : 2;
    if (op == APPEND) {
        int64_t count = number<int64_t>(), strides[] = {g.heads * count * g.head_dim, count * g.head_dim, g.head_dim};
        Bytes key = tensor(), value = tensor();
        must(append_kv(g, {buffers, key.data(), value.data(), strides, strides, count, capacity, 1}));
        for (const Bytes& buffer : layer) write(buffer);
    } else if (op == DEQUANTIZE) {
        Bytes keys(g.batch * g.heads * capacity * g.head_dim * size), values(keys.size());
        dequantize_kv(g, {buffers, keys.data(), values.data(), capacity, 1});
        write(keys);
        write(values);
    } else {
        int64_t heads = number<int64_t>(), length = number<int64_t>(), exact = number<int64_t>();
        int64_t strides[] = {heads * length * g.head_dim, length * g.head_dim, g.head_dim};
        double sm_scale = number<double>();
        Bytes query = tensor(), out(query.size());
        decode_attention(g, {buffers, query.data(), out.data(), nullptr, strides, nullptr, heads, length, CAUSAL,
                             capacity, exact, 1, sm_scale});
        write(out);
    }
}

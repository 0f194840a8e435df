// The torch side: the kernels registered with the dispatcher, which spares every call the way through Python.
//
// What the kernels do not serve goes to the ops' default implementation, as if there were no kernels. So does a call
// whose arguments are wrong, or an append that does not fit: there the error is raised, with words. So everything that
// becomes an address is checked here first (innerq_compile/arguments.py has the same checks).

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <deque>
#include <mutex>

#include "kernels.h"

namespace innerq {
namespace {

using at::Tensor;

// Fills in the settings and returns 1, or returns 0 for a cache that these kernels do not serve. Implemented in Python.
using ReadSettings = int (*)(const char* config, int64_t head_dim, int32_t dtype, Settings*);
ReadSettings read_settings = nullptr;

constexpr const char* BUFFER_NAMES[] = {"k_codes", "k_scales", "k_zeros",  "k_window",   "v_codes", "v_scales",
                                        "v_zeros", "v_window", "key_norm", "key_center", "counts"};
constexpr int NUM_BUFFERS = std::size(BUFFER_NAMES);
enum Buffer {
    K_CODES, K_SCALES, K_ZEROS, K_WINDOW, V_CODES, V_SCALES, V_ZEROS, V_WINDOW, KEY_NORM, KEY_CENTER, COUNTS
};

struct Known {
    std::string config;
    int64_t head_dim;
    DType dtype;
    Settings settings;
    bool served;
    bool is(const std::string& other, int64_t dim, DType type) const {
        return head_dim == dim && dtype == type && config == other;
    }
};

// Settings of a config string, asked for once. Python is called without the lock, because it takes its own.
const Known& known(const std::string& config, int64_t head_dim, DType dtype) {
    static std::mutex mutex;
    static std::deque<Known> all;  // grows, never moves
    thread_local const Known* last = nullptr;
    if (last && last->is(config, head_dim, dtype)) return *last;
    auto find = [&]() -> const Known* {
        for (const Known& k : all) {
            if (k.is(config, head_dim, dtype)) return &k;
        }
        return nullptr;
    };
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (const Known* found = find()) return *(last = found);
    }
    Known fresh{config, head_dim, dtype, {}, false};
    fresh.served = read_settings(config.c_str(), head_dim, dtype, &fresh.settings);
    std::lock_guard<std::mutex> lock(mutex);
    const Known* found = find();
    if (!found) found = &all.emplace_back(std::move(fresh));
    return *(last = found);
}

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return FLOAT32;
        case at::kBFloat16: return BFLOAT16;
        case at::kHalf: return FLOAT16;
        default: return OTHER_DTYPE;
    }
}

// An op's arguments on the stack: `leading` tensors, the buffers of a layer, the rest.
struct Arguments {
    c10::Stack& stack;
    size_t begin, leading;
    Arguments(c10::Stack& stack, size_t count, size_t leading)
        : stack(stack), begin(stack.size() - count), leading(leading) {}
    const c10::IValue& operator[](size_t i) const { return stack[begin + i]; }
    const Tensor& tensor(size_t i) const { return (*this)[i].toTensor(); }
    const Tensor& buffer(int i) const { return tensor(leading + i); }
    const c10::IValue& after_buffers(size_t i) const { return (*this)[leading + NUM_BUFFERS + i]; }
    template <class... Results> void finish(Results&&... results) {
        stack.resize(begin);
        (stack.emplace_back(std::forward<Results>(results)), ...);
    }
};

// What a tensor must be before its memory is touched.
bool is_form(const Tensor& x, at::ScalarType dtype, at::IntArrayRef shape) {
    return x.defined() && x.scalar_type() == dtype && x.is_cpu() && x.layout() == at::kStrided && x.sizes() == shape;
}

// A boolean or additive mask that can be expanded to `shape`.
bool is_mask(const Tensor& x, at::IntArrayRef shape) {
    if (!x.defined() || !x.is_cpu() || x.layout() != at::kStrided || x.dim() > (int64_t)shape.size()) return false;
    for (int64_t i = 1; i <= x.dim(); i++) {
        if (x.size(-i) != 1 && x.size(-i) != shape[shape.size() - i]) return false;
    }
    return x.scalar_type() == at::kBool || at::isFloatingType(x.scalar_type());
}

// Counts that lie inside the buffers, in every row.
bool counts_fit(const Geometry& g, const int64_t* counts, int64_t capacity) {
    for (int64_t row = 0; row < g.batch; row++, counts += 3) {
        int64_t slots = counts[0], quantized = counts[1], pads = counts[2];
        if (slots < 0 || slots > capacity || pads < 0 || pads > capacity || quantized < 0) return false;
        int64_t behind_sink = std::max<int64_t>(slots - pads - g.sink, 0);
        if (quantized > std::min(behind_sink, g.blocks * 32) || quantized % g.flush != 0) return false;
        if (behind_sink - quantized >= g.recent + g.flush) return false;
    }
    return true;
}

// Geometry and addresses of a layer's buffers; false if the kernels do not serve such a layer or something is wrong.
bool read_layer(const Arguments& args, const std::string& config, int64_t capacity, Geometry& g, Buffers& buffers) {
    const Tensor &window = args.buffer(K_WINDOW), &codes = args.buffer(K_CODES);
    if (!window.defined() || !codes.defined() || window.dim() != 4 || codes.dim() != 5) return false;
    g.dtype = dtype_of(window);
    const Known& k = known(config, window.size(3), g.dtype);
    if (!k.served) return false;
    static_cast<Settings&>(g) = k.settings;
    g.batch = window.size(0), g.heads = window.size(1), g.head_dim = window.size(3), g.blocks = codes.size(2);
    int64_t b = g.batch, h = g.heads, n = g.blocks, d = g.head_dim, tiles = d / 32, none[] = {0};
    int64_t key_codes[] = {b, h, n, tiles, 128 * g.key.bits}, value_codes[] = {b, h, n, tiles, 128 * g.value.bits};
    int64_t key_groups[] = {b, h, n, tiles, 32}, value_groups[] = {b, h, n, d}, channels[] = {b, h, d};
    int64_t windows[] = {b, h, g.sink + g.recent + g.flush, d}, rows[] = {b, 3};
    using Shape = at::IntArrayRef;
    const Shape shapes[NUM_BUFFERS] = {
        key_codes, key_groups, g.key.mode == SYMMETRIC ? Shape(none) : Shape(key_groups), windows,
        value_codes, value_groups, g.value.mode == SYMMETRIC ? Shape(none) : Shape(value_groups), windows,
        channels, channels, rows};
    const at::ScalarType model = window.scalar_type(), dtypes[NUM_BUFFERS] = {
        at::kByte, at::kHalf, at::kHalf, model, at::kByte, at::kHalf, at::kHalf, model,
        at::kFloat, at::kFloat, at::kLong};
    void* address[NUM_BUFFERS];
    for (int i = 0; i < NUM_BUFFERS; i++) {
        const Tensor& buffer = args.buffer(i);
        if (!is_form(buffer, dtypes[i], shapes[i]) || !buffer.is_contiguous()) return false;
        address[i] = const_cast<void*>(buffer.const_data_ptr());
    }
    buffers = {static_cast<uint8_t*>(address[K_CODES]), static_cast<Half*>(address[K_SCALES]),
               static_cast<Half*>(address[K_ZEROS]),    address[K_WINDOW],
               static_cast<uint8_t*>(address[V_CODES]), static_cast<Half*>(address[V_SCALES]),
               static_cast<Half*>(address[V_ZEROS]),    address[V_WINDOW],
               static_cast<float*>(address[KEY_NORM]),  static_cast<float*>(address[KEY_CENTER]),
               static_cast<int64_t*>(address[COUNTS])};
    int64_t packed = std::max<int64_t>((capacity - g.sink - g.recent) / g.flush, 1) * g.flush;
    return capacity > 0 && packed <= g.blocks * 32 && counts_fit(g, buffers.counts, capacity);
}

// The op's default implementation: what a device without kernels of its own runs.
void run_default(const c10::OperatorHandle& op, c10::Stack& stack) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), &stack);
}

Tensor rows_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

Tensor new_tensor(at::IntArrayRef shape, const Tensor& like) {
    return at::detail::empty_cpu(shape, like.scalar_type(), std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

// append_kv(key, value, *buffers, capacity, config)
void append_kv_op(const c10::OperatorHandle& op, c10::DispatchKeySet, c10::Stack* stack) {
    Arguments args(*stack, 2 + NUM_BUFFERS + 2, 2);
    Geometry g;
    AppendRequest request;
    const Tensor &window = args.buffer(K_WINDOW), &key = args.tensor(0), &value = args.tensor(1);
    request.capacity = args.after_buffers(0).toSymInt().expect_int();
    if (!read_layer(args, args.after_buffers(1).toStringRef(), request.capacity, g, request.buffers)) {
        return run_default(op, *stack);
    }
    if (key.dim() != 4) return run_default(op, *stack);
    int64_t shape[] = {g.batch, g.heads, key.size(2), g.head_dim};
    if (!is_form(key, window.scalar_type(), shape) || !is_form(value, window.scalar_type(), shape)) {
        return run_default(op, *stack);
    }
    Tensor keys = rows_contiguous(key), values = rows_contiguous(value);
    request.key = keys.const_data_ptr(), request.value = values.const_data_ptr();
    request.key_strides = keys.strides().data(), request.value_strides = values.strides().data();
    request.num_new = keys.size(2);
    request.threads = at::get_num_threads();
    if (!append_kv(g, request)) return run_default(op, *stack);
    args.finish();
}

// dequantize_kv(*buffers, capacity, config) -> (keys, values)
void dequantize_kv_op(const c10::OperatorHandle& op, c10::DispatchKeySet, c10::Stack* stack) {
    Arguments args(*stack, NUM_BUFFERS + 2, 0);
    Geometry g;
    DequantizeRequest request;
    request.capacity = args.after_buffers(0).toSymInt().expect_int();
    if (!read_layer(args, args.after_buffers(1).toStringRef(), request.capacity, g, request.buffers)) {
        return run_default(op, *stack);
    }
    const Tensor& window = args.buffer(K_WINDOW);
    Tensor keys = new_tensor({g.batch, g.heads, request.capacity, g.head_dim}, window);
    Tensor values = new_tensor({g.batch, g.heads, request.capacity, g.head_dim}, window);
    request.keys = keys.mutable_data_ptr(), request.values = values.mutable_data_ptr();
    request.threads = at::get_num_threads();
    dequantize_kv(g, request);
    args.finish(std::move(keys), std::move(values));
}

// decode_attention(query, *buffers, attn_mask, sm_scale, capacity, config, exact) -> out
void decode_attention_op(const c10::OperatorHandle& op, c10::DispatchKeySet, c10::Stack* stack) {
    Arguments args(*stack, 1 + NUM_BUFFERS + 5, 1);
    Geometry g;
    AttentionRequest request;
    const Tensor &given = args.tensor(0), &window = args.buffer(K_WINDOW);
    request.capacity = args.after_buffers(2).toSymInt().expect_int();
    if (!read_layer(args, args.after_buffers(3).toStringRef(), request.capacity, g, request.buffers)) {
        return run_default(op, *stack);
    }
    if (given.dim() != 4) return run_default(op, *stack);
    int64_t shape[] = {g.batch, given.size(1), given.size(2), g.head_dim};
    if (!is_form(given, window.scalar_type(), shape) || given.size(1) == 0 || given.size(1) % g.heads != 0) {
        return run_default(op, *stack);
    }
    int64_t mask_shape[] = {g.batch, given.size(1), given.size(2), request.capacity};
    if (!args.after_buffers(0).isNone() && !is_mask(args.after_buffers(0).toTensor(), mask_shape)) {
        return run_default(op, *stack);
    }
    Tensor query = rows_contiguous(given), out = new_tensor(query.sizes(), query), mask;
    request.query = query.const_data_ptr(), request.query_strides = query.strides().data();
    request.out = out.mutable_data_ptr();
    request.q_heads = query.size(1), request.q_len = query.size(2);
    request.sm_scale = args.after_buffers(1).toDouble();
    request.exact = args.after_buffers(4).toBool();
    request.threads = at::get_num_threads();
    request.mask = nullptr, request.mask_strides = nullptr, request.mask_kind = CAUSAL;
    if (!args.after_buffers(0).isNone()) {
        const Tensor& any = args.after_buffers(0).toTensor();
        request.mask_kind = any.scalar_type() == at::kBool ? BOOLEAN : ADDITIVE;
        mask = request.mask_kind == BOOLEAN ? any : any.to(at::kFloat);
        mask = mask.expand(mask_shape);
        request.mask = mask.const_data_ptr(), request.mask_strides = mask.strides().data();
    }
    decode_attention(g, request);
    args.finish(std::move(out));
}

template <void (*kernel)(const c10::OperatorHandle&, c10::DispatchKeySet, c10::Stack*)>
void attach(const std::string& name, size_t leading) {
    c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
    const auto& arguments = dispatcher.findSchemaOrThrow(name.c_str(), "").schema().arguments();
    for (int i = 0; i < NUM_BUFFERS; i++) {
        TORCH_CHECK(arguments.at(leading + i).name() == BUFFER_NAMES[i], name, " has another order of buffers");
    }
    // Never released: the ops outlive everything that could call them.
    new c10::RegistrationHandleRAII(
        dispatcher.registerImpl({name, ""}, c10::DispatchKey::CPU,
                                c10::KernelFunction::makeFromBoxedFunction<kernel>(), std::nullopt, nullptr, __FILE__));
}

}  // namespace
}  // namespace innerq

extern "C" INNERQ_EXPORT const char* innerq_instruction_set() { return innerq::instruction_set(); }

// Attaches the kernels to the CPU key of the three ops of a namespace; returns 0, or 1 with a reason.
extern "C" INNERQ_EXPORT int innerq_register(const char* ops_namespace, innerq::ReadSettings read,
                                             innerq::OmpParallel parallel, char* reason, size_t size) try {
    using namespace innerq;
    read_settings = read, omp_parallel = parallel;
    std::string prefix = std::string(ops_namespace) + "::";
    attach<append_kv_op>(prefix + "append_kv", 2);
    attach<dequantize_kv_op>(prefix + "dequantize_kv", 0);
    attach<decode_attention_op>(prefix + "decode_attention", 1);
    return 0;
} catch (const std::exception& error) {
    std::snprintf(reason, size, "%s", error.what());
    return 1;
}

/* The kernels as ONNX Runtime custom operators of the domain "resq": RegisterCustomOps is what register_custom_ops_library and
 * onnxruntime-genai call. Operands of every operator: the table at the end. */
#include <unistd.h>

#include "onnx_kernel.h"

#define RK_PUBLIC __attribute__((visibility("default")))

static const description *of(const OrtCustomOp *op) { return (const description *)op; }

int type_of(char letter) {
    switch (letter | 32) {
    case 'f': return ORT_FLOAT;
    case 'b': return ORT_INT8;
    case 'u': return ORT_UINT8;
    case 'i': return ORT_INT32;
    case 'l': return ORT_INT64;
    default: return ORT_BOOL;
    }
}

static const char *op_name(const OrtCustomOp *op) { return of(op)->name; }
static const char *on_cpu(const OrtCustomOp *op) { (void)op; return NULL; }
static int input_type(const OrtCustomOp *op, size_t i) { return type_of(of(op)->inputs[i]); }
static int output_type(const OrtCustomOp *op, size_t i) { return type_of(of(op)->outputs[i]); }
static size_t input_count(const OrtCustomOp *op) { return strlen(of(op)->inputs); }
static size_t output_count(const OrtCustomOp *op) { return strlen(of(op)->outputs); }
static int input_kind(const OrtCustomOp *op, size_t i) { return of(op)->inputs[i] < 'a' ? ORT_OPTIONAL : ORT_REQUIRED; }
static int output_kind(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_REQUIRED; }
static int memory_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; }
static int one(const OrtCustomOp *op) { (void)op; return 1; }
static int newest(const OrtCustomOp *op) { (void)op; return INT32_MAX; }
static void destroy(void *data) { free(data); }

void read_int(const origin *from, const char *name, int64_t *value) {
    char whole[48];
    snprintf(whole, sizeof whole, "%s%s", from->prefix, name);
    OrtStatus *status = ORT_ATTRIBUTE_INT(from->api)(from->info, whole, value);
    if (status)
        ORT_RELEASE_STATUS(from->api)(status);
}

static void read_float(const origin *from, const char *name, float *value) {
    char whole[48];
    snprintf(whole, sizeof whole, "%s%s", from->prefix, name);
    OrtStatus *status = ORT_ATTRIBUTE_FLOAT(from->api)(from->info, whole, value);
    if (status)
        ORT_RELEASE_STATUS(from->api)(status);
}

/* prefix_blocks, prefix_order0, prefix_order1, ... */
static void read_transform(const origin *from, const char *prefix, rk_transform *t) {
    char name[32];
    t->blocks = 1;
    snprintf(name, sizeof name, "%s_blocks", prefix);
    read_int(from, name, &t->blocks);
    for (t->factors = 0; t->factors < RK_MAX_FACTORS; t->factors++) {
        int64_t order = 0;
        snprintf(name, sizeof name, "%s_order%d", prefix, t->factors);
        read_int(from, name, &order);
        if (order < 1)
            return;
        t->order[t->factors] = (int32_t)order;
    }
}

static void read_attributes(const origin *from, node *n) {
    struct { const char *name; int64_t *value; } ints[] = {
        {"norm", &n->norm}, {"activation", &n->activation}, {"low_groups", &n->low_groups}, {"high_groups", &n->high_groups},
        {"heads", &n->heads}, {"kv_heads", &n->kv_heads}, {"window", &n->window}, {"stacked", &n->stacked}, {"low_width", &n->low_width}, {"high_width", &n->high_width},
        {"low_bits", &n->low_bits}, {"high_bits", &n->high_bits}, {"value_low_width", &n->value_low_width},
        {"value_high_width", &n->value_high_width}, {"value_low_bits", &n->value_low_bits}, {"value_high_bits", &n->value_high_bits},
        {"latent_heads", &n->latent_heads}, {"own", &n->own}, {"values", &n->values}, {"key_low_bits", &n->key_low_bits}, {"key_high_bits", &n->key_high_bits},
        {"result_low_width", &n->result_low_width}, {"result_high_width", &n->result_high_width}, {"gated", &n->gated},
        {"hidden_low_width", &n->hidden_low_width}, {"hidden_high_width", &n->hidden_high_width},
        {"hidden_low_bits", &n->hidden_low_bits}, {"hidden_high_bits", &n->hidden_high_bits},
    };
    struct { const char *name; float *value; } floats[] = {
        {"epsilon", &n->epsilon}, {"low_clip", &n->low_clip}, {"high_clip", &n->high_clip},
        {"cache_clip", &n->cache_clip}, {"scale", &n->scale}, {"softcap", &n->softcap}, {"limit", &n->limit}, {"slope", &n->slope},
        {"hidden_low_clip", &n->hidden_low_clip}, {"hidden_high_clip", &n->hidden_high_clip},
    };
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        read_int(from, ints[i].name, ints[i].value);
    for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++)
        read_float(from, floats[i].name, floats[i].value);
    if (!n->result_low_width && !n->result_high_width)
        n->result_low_width = n->value_low_width, n->result_high_width = n->value_high_width;
    read_transform(from, "low", &n->low_transform);
    read_transform(from, "high", &n->high_transform);
}

static int sane_bits(int64_t low, int64_t high) { return low >= 2 && low <= 8 && high >= 2 && high <= 8; }
static int sane_cached_bits(int64_t low, int64_t high) { return sane_bits(low, high) && low <= 4 && high >= 5; }

static int sane_clip(float clip) { return clip > 0 && clip <= 1; }

/* Whether widths, bits and numbers of heads can be worked with at all. */
static int sane(const node *n) {
    const int64_t widths[] = {n->low_width, n->high_width, n->value_low_width, n->value_high_width, n->result_low_width, n->result_high_width,
                              n->hidden_low_width, n->hidden_high_width};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++)
        if (widths[i] < 0 || widths[i] > RK_MAX_COLUMNS || (n->heads && widths[i] > RK_MAX_HEAD))
            return 0;
    if (n->low_width + n->high_width < 1 || n->low_groups < 1 || n->low_groups > RK_MAX_COLUMNS || n->high_groups < 1 ||
        n->high_groups > RK_MAX_COLUMNS || n->window < 0)
        return 0;
    const int heads_fit = !n->heads || (n->heads > 0 && n->kv_heads > 0 && n->heads % n->kv_heads == 0 &&
                                        n->low_width + n->high_width <= RK_MAX_HEAD && n->value_low_width + n->value_high_width > 0 &&
                                        n->value_low_width + n->value_high_width <= RK_MAX_HEAD &&
                                        n->result_low_width + n->result_high_width == n->value_low_width + n->value_high_width);
    const int hidden_fits = sane_bits(n->hidden_low_bits, n->hidden_high_bits) && sane_clip(n->hidden_low_clip) && sane_clip(n->hidden_high_clip);
    return heads_fit && hidden_fits && sane_bits(n->low_bits, n->high_bits) && sane_cached_bits(n->value_low_bits, n->value_high_bits) &&
           sane_cached_bits(n->key_low_bits, n->key_high_bits) && sane_clip(n->low_clip) && sane_clip(n->high_clip) && sane_clip(n->cache_clip);
}

OrtStatus *read_constant(kernel *k, const OrtKernelInfo *info, size_t i, size_t index) {
    call c = {.n = &k->n};
    const OrtValue *value = NULL;
    int constant = 0;
    if (keep(&c, ORT_CONSTANT_INPUT(k->n.api)(info, index, &constant, &value)) && constant)
        read_tensor(&c, value, &k->constant[i]);
    k->is_constant[i] = (int8_t)constant;
    return c.status;
}

static OrtStatus *refuse_attributes(const kernel *k) {
    char text[256];
    snprintf(text, sizeof text, "resq: attributes of a %s node do not fit: expected bits 2 to 8 (in a cache low ones to 4, high ones "
             "from 5), widths of at least one column, clips in (0, 1], and heads a multiple of kv_heads with at most 256 columns", k->d->name);
    return ORT_CREATE_STATUS(k->n.api)(ORT_INVALID_ARGUMENT, text);
}

OrtStatus *begin_kernel(kernel *k, const description *d, const origin *from) {
    const int needs_heads = strstr(d->inputs, "uum") != NULL;
    k->d = d;
    k->n = (node){.api = from->api, .fused = d->fused == FUSED, .threads = sysconf(_SC_NPROCESSORS_ONLN),
                  .low_groups = 1, .high_groups = 1, .low_bits = 4, .high_bits = 8,
                  .value_low_bits = 4, .value_high_bits = 8, .key_low_bits = 4, .key_high_bits = 8,
                  .hidden_low_bits = 4, .hidden_high_bits = 8, .hidden_low_clip = 1, .hidden_high_clip = 1,
                  .low_clip = 1, .high_clip = 1, .cache_clip = 1, .scale = 1};
    if (d->fused == NO_ATTRIBUTES)
        return NULL;
    read_attributes(from, &k->n);
    return sane(&k->n) && (!needs_heads || k->n.heads) ? NULL : refuse_attributes(k);
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **made) {
    const origin from = {api, info, ""};
    kernel *k = calloc(1, sizeof *k);
    if (!k)
        return ORT_CREATE_STATUS(api)(ORT_INVALID_ARGUMENT, "resq: out of memory");
    OrtStatus *status = begin_kernel(k, of(op), &from);
    for (size_t i = 0; !status && i < strlen(k->d->inputs); i++)
        status = read_constant(k, info, i, i);
    *made = status ? NULL : k;
    if (status)
        free(k);
    return status;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const kernel *k = data;
    call c = {.n = &k->n, .context = context};
    const size_t count = strlen(k->d->inputs);
    for (size_t i = 0; i < count && !c.status; i++)
        if (k->is_constant[i])
            c.in[i] = k->constant[i];
        else
            read_input(&c, i, &c.in[i]);
    if (!c.status)
        k->d->run(&c);
    while (c.rooms)
        free(c.room[--c.rooms]);
    return c.status;
}

#define OPERATOR(title, function, in, out, fused) \
    {{ORT_VERSION, NULL, op_name, on_cpu, input_type, input_count, output_type, output_count, NULL, destroy, input_kind, output_kind, \
      memory_type, one, one, one, one, create, compute, NULL, one, newest}, title, function, in, out, fused}
#define LINEAR "uufiFF"
#define EXPERTS "ufiiF"

static const description operators[] = {
    OPERATOR("NormQuantize", op_norm_quantize, "fFF", "bbfi", PLAIN),
    OPERATOR("MixedLinear", op_mixed_linear, "bbfi" LINEAR, "f", PLAIN),
    OPERATOR("HadamardQuantize", op_hadamard_quantize, "fFF", "bbfi", PLAIN),
    OPERATOR("RopeCache", op_rope_cache, "fffuumFFF", "fuu", PLAIN),
    OPERATOR("CacheImage", op_cache_image, "fum", "fu", PLAIN),
    OPERATOR("LatentAttention", op_latent_attention, "fffmuuuufi", "fuu", PLAIN),
    OPERATOR("Attention", op_attention, "fuumFFFF", "f", PLAIN),
    OPERATOR("AttentionQuantize", op_attention_quantize, "fuumFFFF", "bbfi", PLAIN),
    OPERATOR("NormLinear", op_norm_linear, "fFF" LINEAR, "f", FUSED),
    OPERATOR("HadamardLinear", op_hadamard_linear, "fFF" LINEAR, "f", FUSED),
    OPERATOR("AttentionLinear", op_attention_linear, "fffuumFFF" "FFFF" LINEAR, "fuu", FUSED),
    OPERATOR("Experts", op_experts, "bbfilf" EXPERTS EXPERTS "F", "f", PLAIN),
    OPERATOR("Rows", op_rows, "luf", "f", PLAIN),
    OPERATOR("Embed", op_embed, "lbf", "f", NO_ATTRIBUTES),
    OPERATOR("Angles", op_angles, "lf", "f", NO_ATTRIBUTES),
    OPERATOR("Seen", op_seen, "l", "m", NO_ATTRIBUTES),
    OPERATOR("Keep", op_keep, "fll", "f", NO_ATTRIBUTES),
};

const description *find_operator(const char *name) {
    for (size_t i = 0; i < sizeof operators / sizeof operators[0]; i++)
        if (!strcmp(operators[i].name, name))
            return &operators[i];
    return NULL;
}

/* Inputs and outputs of any number and type: a graph says which. */
static const char *chain_name(const OrtCustomOp *op) { (void)op; return "Chain"; }
static int any_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_UNDEFINED; }
static size_t one_list(const OrtCustomOp *op) { (void)op; return 1; }
static int variadic(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_VARIADIC; }
static int of_all_types(const OrtCustomOp *op) { (void)op; return 0; }

static const OrtCustomOp chain_operator = {
    ORT_VERSION, NULL, chain_name, on_cpu, any_type, one_list, any_type, one_list, NULL, destroy_chain, variadic, variadic, memory_type,
    one, of_all_types, one, of_all_types, create_chain, compute_chain, NULL, one, newest};

RK_PUBLIC OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi api = base->get_api(ORT_VERSION);
    OrtDomain *domain = NULL;
    if (!api)
        return ((OrtStatus * (*)(int, const char *)) base->get_api(1)[0])(ORT_INVALID_ARGUMENT, "resq: needs ONNX Runtime 1.17 or newer");
    OrtStatus *status = ORT_CREATE_DOMAIN(api)("resq", &domain);
    for (size_t i = 0; !status && i < sizeof operators / sizeof operators[0]; i++)
        status = ORT_DOMAIN_ADD(api)(domain, &operators[i].op);
    if (!status)
        status = ORT_DOMAIN_ADD(api)(domain, &chain_operator);
    return status ? status : ORT_ADD_DOMAIN(api)(options, domain);
}

/* Operators one behind the other as one node. Between two nodes ONNX Runtime reads its objects, which the weights of a step of generation
 * have swept out of the caches since the last one: four microseconds a node, of 28 that its kernel takes. What a step of a chain needs lies
 * together here, and is asked for before every kernel of the step before: its weights sweep the caches, too.
 *
 * Attributes: steps, slots, reads, makes (registers: below); step 3 is an operator with the attributes 3_... it would have as a node, and
 *     3_step  "NormLinear 0 -1 -1 7 8 9 10 > 130"    its inputs and its outputs, each a register, -1 where an optional one is absent
 *     3_name  what errors call it
 * Registers: the inputs of the chain, then `slots` that only steps know, then the outputs of the chain. */
#include "onnx_kernel.h"

#define MAX_OUTPUTS 4
#define MAX_STEP 256         /* characters of a step's description or name */
#define KEPT_BYTES (1 << 20) /* up to which slots stay from call to call; a prompt's are given back */
#define LINE 64

typedef struct {
    kernel k;
    int16_t in[MAX_INPUTS], out[MAX_OUTPUTS];
    char name[MAX_STEP];
} step;

/* What a call computes with. */
typedef struct {
    void *data;
    int64_t bytes;
} slot;

typedef struct {
    tensor *registers;
    slot *slots;
} memory;

typedef struct {
    OrtApi api;
    int64_t steps, slots, inputs, outputs, given_count;
    step *step;
    int16_t *given; /* inputs that are not constant */
    memory *spare;  /* of the last call; NULL: another call has it, or there was none */
} chain;

typedef struct {
    call c; /* first, so that a pointer to it is one to all */
    const chain *chain;
    const step *now;
    memory *m;
} chain_call;

/* Memory ------------------------------------------------------------------------------------------------------------------- */

static int64_t registers_of(const chain *k) { return k->inputs + k->slots + k->outputs; }

static void *new_lines(int64_t bytes) {
    void *made = NULL;
    return posix_memalign(&made, LINE, (size_t)bytes + LINE) ? NULL : made;
}

static int64_t empty_slots(const chain *k, memory *m, int64_t above) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < k->slots; i++)
        bytes += m->slots[i].bytes;
    for (int64_t i = 0; bytes > above && i < k->slots; i++) {
        free(m->slots[i].data);
        m->slots[i] = (slot){0};
    }
    return bytes;
}

static void destroy_memory(const chain *k, memory *m) {
    if (!m)
        return;
    if (m->slots)
        empty_slots(k, m, -1);
    free(m->slots);
    free(m->registers);
    free(m);
}

static memory *take_memory(chain *k) {
    memory *m = __atomic_exchange_n(&k->spare, NULL, __ATOMIC_ACQ_REL);
    if (m)
        return m;
    m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->registers = new_lines(registers_of(k) * (int64_t)sizeof(tensor));
    m->slots = calloc((size_t)k->slots + 1, sizeof(slot));
    if (m->registers && m->slots)
        return m;
    destroy_memory(k, m);
    return NULL;
}

static void give_back(chain *k, memory *m) {
    empty_slots(k, m, KEPT_BYTES);
    destroy_memory(k, __atomic_exchange_n(&k->spare, m, __ATOMIC_ACQ_REL));
}

/* Steps -------------------------------------------------------------------------------------------------------------------- */

static int64_t bytes_of(char letter) { return letter == 'f' || letter == 'i' ? 4 : 1; }

static void *in_slot(call *c, slot *s, int64_t bytes) {
    if (s->bytes < bytes || !s->data) {
        free(s->data);
        s->data = new_lines(bytes);
        s->bytes = s->data ? bytes : 0;
    }
    require(c, s->data != NULL, "a result between steps", "enough memory");
    return s->data;
}

/* Where an output of a step goes: into a slot, or to ONNX Runtime. */
static void *place_output(call *c, size_t index, const int64_t *dims, size_t rank) {
    const chain_call *all = (const chain_call *)c;
    const chain *k = all->chain;
    const int64_t place = all->now->out[index], output = place - k->inputs - k->slots;
    tensor *t = &all->m->registers[place];
    OrtValue *value = NULL;
    memcpy(t->dims, dims, sizeof(int64_t) * rank);
    t->rank = (uint32_t)rank, t->type = type_of(all->now->k.d->outputs[index]), t->data = NULL;
    if (output < 0)
        t->data = in_slot(c, &all->m->slots[place - k->inputs], size_of(t) * bytes_of(all->now->k.d->outputs[index]));
    else if (keep(c, ORT_OUTPUT(k->api)(c->context, (size_t)output, dims, rank, &value)))
        keep(c, ORT_DATA(k->api)(value, &t->data));
    return t->data;
}

static void run_step(chain_call *all, const step *s) {
    call *c = &all->c;
    const kernel *k = &s->k;
    all->now = s, c->n = &k->n, c->step = s->name;
    for (size_t i = 0; k->d->inputs[i]; i++)
        if (k->is_constant[i])
            c->in[i] = k->constant[i];
        else if (s->in[i] >= 0)
            c->in[i] = all->m->registers[s->in[i]];
        else
            c->in[i] = (tensor){.rank = 0};
    for (size_t i = 0; k->d->inputs[i]; i++)
        require(c, s->in[i] < 0 || c->in[i].type == type_of(k->d->inputs[i]), "an input", "the type that its operator takes");
    if (!c->status)
        k->d->run(c);
    while (c->rooms)
        free(c->room[--c->rooms]);
}

OrtStatus *compute_chain(void *data, OrtKernelContext *context) {
    chain *k = data;
    chain_call all = {.chain = k, .m = take_memory(k)};
    all.c.n = &k->step[0].k.n, all.c.context = context, all.c.place = place_output;
    require(&all.c, all.m != NULL, "a chain", "enough memory");
    if (all.m) /* what a step reads another has written in this call */
        memset(all.m->registers + k->inputs, 0, sizeof(tensor) * (size_t)(k->slots + k->outputs));
    for (int64_t i = 0; i < k->given_count && !all.c.status; i++)
        read_input(&all.c, (size_t)k->given[i], &all.m->registers[k->given[i]]);
    for (int64_t i = 0; i < k->steps && !all.c.status; i++) {
        all.c.ahead = (const char *)&k->step[i + (i + 1 < k->steps)];
        all.c.ahead_end = all.c.ahead + offsetof(step, name);
        run_step(&all, &k->step[i]);
    }
    if (all.m)
        give_back(k, all.m);
    return all.c.status;
}

/* Attributes --------------------------------------------------------------------------------------------------------------- */

static OrtStatus *refuse(OrtApi api, const char *what) {
    char text[256];
    snprintf(text, sizeof text, "resq: a Chain node is damaged: %s; export the model again", what);
    return ORT_CREATE_STATUS(api)(ORT_INVALID_ARGUMENT, text);
}

static OrtStatus *read_text(const origin *from, const char *name, char text[MAX_STEP]) {
    char whole[48];
    size_t size = MAX_STEP;
    snprintf(whole, sizeof whole, "%s%s", from->prefix, name);
    return ORT_ATTRIBUTE_STRING(from->api)(from->info, whole, text, &size);
}

/* The register that *at begins with, and *at behind it; -2: there is none. */
static int next_register(char **at, int64_t count) {
    char *end = *at;
    const long found = strtol(*at, &end, 10);
    const int there = end != *at && found >= -1 && found < count;
    *at = end;
    return there ? (int)found : -2;
}

/* "Name 0 -1 7 > 130": the operator, and the registers of its inputs and outputs. */
static int read_step(const chain *k, char *text, step *s, const description **d) {
    char *at = strchr(text, ' ');
    if (!at)
        return 0;
    *at++ = 0;
    *d = find_operator(text);
    const size_t inputs = *d ? strlen((*d)->inputs) : 0, outputs = *d ? strlen((*d)->outputs) : 0;
    for (size_t i = 0; i < inputs; i++) {
        at += strspn(at, " ");
        s->in[i] = *at == '>' ? -1 : (int16_t)next_register(&at, registers_of(k));
        if (s->in[i] < ((*d)->inputs[i] < 'a' ? -1 : 0))
            return 0;
    }
    at += strspn(at, " ");
    if (!inputs || *at++ != '>')
        return 0;
    for (size_t i = 0; i < outputs; i++) {
        s->out[i] = (int16_t)next_register(&at, registers_of(k));
        if (s->out[i] < k->inputs)
            return 0;
    }
    return !*at;
}

static OrtStatus *make_step(const chain *k, origin *from, int64_t number) {
    step *s = &k->step[number];
    char text[MAX_STEP];
    const description *d = NULL;
    snprintf(from->prefix, sizeof from->prefix, "%d_", (int)number);
    OrtStatus *status = read_text(from, "step", text);
    if (!status)
        status = read_text(from, "name", s->name);
    if (!status && !read_step(k, text, s, &d))
        status = refuse(k->api, "a step is none of this library's operators, or its inputs and outputs are not those of one");
    if (!status)
        status = begin_kernel(&s->k, d, from);
    for (size_t i = 0; !status && d->inputs[i]; i++)
        if (s->in[i] >= 0 && s->in[i] < k->inputs)
            status = read_constant(&s->k, from->info, i, (size_t)s->in[i]);
    return status;
}

/* Inputs that some step reads and that are not constant. */
static void list_given(chain *k) {
    for (int64_t input = 0; input < k->inputs; input++) {
        int needed = 0;
        for (int64_t s = 0; s < k->steps; s++)
            for (size_t i = 0; k->step[s].k.d->inputs[i]; i++)
                needed |= k->step[s].in[i] == input && !k->step[s].k.is_constant[i];
        if (needed)
            k->given[k->given_count++] = (int16_t)input;
    }
}

OrtStatus *create_chain(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **made) {
    origin from = {api, info, ""};
    chain *k = calloc(1, sizeof *k);
    OrtStatus *status = NULL;
    (void)op;
    *made = NULL;
    if (!k)
        return refuse(api, "out of memory");
    k->api = api;
    read_int(&from, "steps", &k->steps), read_int(&from, "slots", &k->slots);
    read_int(&from, "reads", &k->inputs), read_int(&from, "makes", &k->outputs);
    const int64_t counts[] = {k->steps, k->slots, k->inputs, k->outputs};
    int fits = k->steps > 0;
    for (int i = 0; i < 4; i++)
        fits = fits && counts[i] >= 0 && counts[i] < INT16_MAX / 4;
    if (fits) {
        k->step = new_lines(k->steps * (int64_t)sizeof(step));
        k->given = calloc((size_t)k->inputs + 1, sizeof *k->given);
    }
    if (!k->step || !k->given)
        status = refuse(api, fits ? "out of memory" : "steps, slots, inputs or outputs");
    if (!status)
        memset(k->step, 0, (size_t)k->steps * sizeof(step));
    for (int64_t i = 0; i < k->steps && !status; i++)
        status = make_step(k, &from, i);
    if (status) {
        destroy_chain(k);
        return status;
    }
    list_given(k);
    *made = k;
    return NULL;
}

void destroy_chain(void *data) {
    chain *k = data;
    destroy_memory(k, k->spare);
    free(k->step);
    free(k->given);
    free(k);
}

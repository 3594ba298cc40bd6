/* An operator and the state of a node of it: of a node of the graph, or of a step of a chain. */
#ifndef RK_ONNX_KERNEL_H
#define RK_ONNX_KERNEL_H

#include "onnx_call.h"

enum { PLAIN, FUSED, NO_ATTRIBUTES }; /* FUSED: a quantizer with the linear behind it */

typedef struct {
    OrtCustomOp op; /* first, so that a pointer to it is one to the description */
    const char *name;
    void (*run)(call *);
    const char *inputs;  /* a letter each: f float, b int8, u uint8, i int32, l int64, m bool; capital: optional */
    const char *outputs;
    int fused;
} description;

typedef struct {
    node n;
    const description *d;
    int8_t is_constant[MAX_INPUTS];
    tensor constant[MAX_INPUTS];
} kernel;

/* ONNX's number of a letter of `inputs` or `outputs`. */
int type_of(char letter);

/* Where the attributes of a kernel are: those of a node whose names begin with prefix. */
typedef struct {
    OrtApi api;
    const OrtKernelInfo *info;
    char prefix[16];
} origin;

void read_int(const origin *from, const char *name, int64_t *value); /* absent: the default stays */

/* The operator of that name; NULL: there is none. */
const description *find_operator(const char *name);

/* A kernel that knows its attributes, but no constants yet. */
OrtStatus *begin_kernel(kernel *k, const description *d, const origin *from);

/* Reads input `index` of a node for input i of a kernel where it is constant. Weights are read once: asking ONNX Runtime for an operand
 * costs a fifth of a microsecond. */
OrtStatus *read_constant(kernel *k, const OrtKernelInfo *info, size_t i, size_t index);

/* The operator Chain: onnx_chain.c. */
OrtStatus *create_chain(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **made);
OrtStatus *compute_chain(void *data, OrtKernelContext *context);
void destroy_chain(void *data);

#endif
